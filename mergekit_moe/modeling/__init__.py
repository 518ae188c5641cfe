"""The model class. Importing this package registers it, so that `trust_remote_code` isn't needed."""

import transformers
from transformers import AutoConfig, AutoModel

from .configuration_metamoe import DECODERS, ENCODERS, FAMILIES, config_class
from .modeling_metamoe import _native_class, model_class

HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
}
"""Head of a native class -> the Auto class that loads it."""

for _family in FAMILIES:
    _config = config_class(_family)
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, model_class(_family, "Model"), exist_ok=True)
    for _head, _auto in HEADS.items():
        # A BERT can be used as a decoder; a router that sees the whole text can't.
        if not (_family in ENCODERS and _head == "ForCausalLM") and _native_class(_family, _head) is not None:
            getattr(transformers, _auto).register(_config, model_class(_family, _head), exist_ok=True)

__all__ = ["DECODERS", "ENCODERS", "FAMILIES", "HEADS", "config_class", "model_class"]
