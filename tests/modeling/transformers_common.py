"""transformers' own common model and generation tests, run against our classes and, as a control, native Mixtral.

Not collected by the suite: it needs the tests of the installed transformers version as a package whose parent
folder is on PYTHONPATH (TRANSFORMERS_TESTS.md says where they come from, and what they say):

    RUN_SLOW=1 PYTHONPATH=FOLDER_WITH_TESTS python -m pytest tests/modeling/transformers_common.py
"""

import unittest
from typing import Any

import torch
import transformers
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers.models.auto import modeling_auto

from mergekit_moe.modeling import config_class, model_class

LORA = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 2)
# New routers are blank and send all tokens to the first: the whole FFN, for the experts interface's tests.
EXPERTS = [{"name": "whole", "kind": "dense"}, {"name": "factored", "scale": 2.0, "ranks": LORA}]


class Tester:
    """A tiny model and a batch, in the form that the common tests ask for."""

    batch_size, seq_length, is_training = 5, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99

    def __init__(self, parent: unittest.TestCase, config: type, **settings: Any) -> None:
        self.parent, self.config, self.settings = parent, config, settings

    def get_config(self) -> Any:
        return self.config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=48,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.settings,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.tril(torch.ones_like(ids))
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class Common(ModelTesterMixin, GenerationTesterMixin):
    family: str
    settings: dict[str, Any] = {}
    test_can_init_all_missing_weights_before_2023 = True  # it tells a model's year by its licence line

    def setUp(self) -> None:
        config = (
            getattr(transformers, f"{self.family}Config") if self.family == "Mixtral" else config_class(self.family)
        )
        self.model_tester = Tester(self, config, **self.settings)
        self.config_tester = ConfigTester(self, config_class=config, hidden_size=37)


def common(family: str, **settings: Any) -> type:
    """Return the test case of one family."""
    if family == "Mixtral":
        classes = (transformers.MixtralModel, transformers.MixtralForCausalLM)
    else:
        classes = tuple(model_class(family, head) for head in ("Model", "ForCausalLM"))
        settings = {"experts": EXPERTS, **settings}
        model_type = config_class(family).model_type
        modeling_auto.MODEL_MAPPING_NAMES[model_type] = classes[0].__name__
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = classes[1].__name__
    body = {
        "family": family,
        "settings": settings,
        "all_model_classes": classes,
        "all_generative_model_classes": classes[1:],
    }
    body |= {"test_all_params_have_gradient": False, "__module__": __name__}
    return type(f"{family}Test", (Common, unittest.TestCase), body)


LlamaTest = common("Llama")
Qwen3Test = common("Qwen3", head_dim=8)
Gemma2Test = common("Gemma2", head_dim=8)
MixtralTest = common("Mixtral", num_local_experts=2, head_dim=8)
