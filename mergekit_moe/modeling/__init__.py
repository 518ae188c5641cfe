"""The model class. Importing this package registers it, so that `trust_remote_code` isn't needed."""

import transformers
from transformers import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING as ZERO_SHOT
from transformers import AutoConfig, AutoModelForZeroShotImageClassification

from .configuration_metamoe import DECODERS, ENCODERS, FAMILIES, config_class
from .modeling_metamoe import HEADS, _native_class, model_class

for _family in FAMILIES:
    _config = config_class(_family)
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _head, _auto in HEADS.items():
        # A BERT can be used as a decoder; a router that sees the whole text can't.
        if not (_family in ENCODERS and _head == "ForCausalLM") and _native_class(_family, _head) is not None:
            getattr(transformers, _auto).register(_config, model_class(_family, _head), exist_ok=True)
    if getattr(transformers, f"{_family}Config") in ZERO_SHOT:
        AutoModelForZeroShotImageClassification.register(_config, model_class(_family, "Model"), exist_ok=True)

__all__ = ["DECODERS", "ENCODERS", "FAMILIES", "HEADS", "config_class", "model_class"]
