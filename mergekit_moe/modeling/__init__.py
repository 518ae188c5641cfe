"""The model class. Importing this package registers it, so that `trust_remote_code` isn't needed."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_metamoe import FAMILIES, config_class
from .modeling_metamoe import model_class

for _family in FAMILIES:
    _config = config_class(_family)
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, model_class(_family, "Model"))
    AutoModelForCausalLM.register(_config, model_class(_family, "ForCausalLM"))

__all__ = ["FAMILIES", "config_class", "model_class"]
