"""transformers' own common model and generation tests, run against our classes and, as controls, native ones.

Not collected by the suite: it needs the tests of the installed transformers version as a package whose parent
folder is on PYTHONPATH (TRANSFORMERS_TESTS.md says where they come from, and what they say):

    RUN_SLOW=1 PYTHONPATH=FOLDER_WITH_TESTS python -m pytest tests/modeling/transformers_common.py
"""

import unittest
from typing import Any
from unittest import mock

import torch
import transformers
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from torch import nn
from transformers import initialization
from transformers.models.auto import modeling_auto

from mergekit_moe.modeling import config_class, model_class
from mergekit_moe.modeling.experts_metamoe import LowRank
from mergekit_moe.modeling.modeling_metamoe import MetaMoeMixin
from mergekit_moe.modeling.routing_metamoe import ContextRouter

DENSE = {"kind": "dense"}
LORA = {"scale": 2.0, "ranks": dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 2)}


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
    settings: dict[str, Any] = {}
    test_can_init_all_missing_weights_before_2023 = True  # it tells a model's year by its licence line

    def setUp(self) -> None:
        config = self.all_model_classes[0].config_class
        self.model_tester = Tester(self, config, **self.settings)
        self.config_tester = ConfigTester(self, config_class=config, hidden_size=37)


_init_weights = MetaMoeMixin._init_weights


@torch.no_grad()
def draw(model: MetaMoeMixin, module: nn.Module) -> None:
    """Initialise as the class does, but the routers' rows and the factors at random."""
    _init_weights(model, module)
    drawn = {ContextRouter: ("weight",), LowRank: ("lora_A", "lora_B")}.get(type(module), ())
    for name in drawn:
        initialization.normal_(getattr(module, name), std=0.5)


class Routed(Common):
    """New routers are blank, and would send every token to the first expert."""

    def setUp(self) -> None:
        super().setUp()
        self.enterContext(mock.patch.object(MetaMoeMixin, "_init_weights", draw))


def case(base: type, classes: tuple[type, ...], **settings: Any) -> type:
    """Return the test case of a headless class and the one with a language-modelling head."""
    body = {"settings": settings, "all_model_classes": classes, "all_generative_model_classes": classes[1:]}
    body |= {"test_all_params_have_gradient": False, "__module__": __name__}
    return type(classes[0].__name__.replace("Model", "Test"), (base, unittest.TestCase), body)


def native(family: str, **settings: Any) -> type:
    """Return the test case of one of the library's own families: the control."""
    classes = tuple(getattr(transformers, family + head) for head in ("Model", "ForCausalLM"))
    return case(Common, classes, **settings)


def ours(family: str, *experts: dict[str, Any], **settings: Any) -> type:
    """Return the test case of our version of a family."""
    classes = tuple(model_class(family, head) for head in ("Model", "ForCausalLM"))
    model_type = config_class(family).model_type
    modeling_auto.MODEL_MAPPING_NAMES[model_type] = classes[0].__name__
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = classes[1].__name__
    named = [{"name": f"e{number}", **expert} for number, expert in enumerate(experts)]
    return case(Routed, classes, experts=named, **settings)


MetaMoeLlamaTest, LlamaTest = ours("Llama", DENSE, LORA), native("Llama")
MetaMoeLlamaLoraTest = ours("Llama", LORA, LORA, LORA, router_adds_layers=True)
MetaMoeQwen3Test = ours("Qwen3", DENSE, LORA, LORA, num_experts_per_tok=2, head_dim=8, router_adds_layers=True)
MetaMoeGemma2Test = ours("Gemma2", DENSE, LORA, head_dim=8)
Qwen3Test, Gemma2Test = (native(family, head_dim=8) for family in ("Qwen3", "Gemma2"))
MixtralTest = native("Mixtral", num_local_experts=2, head_dim=8)
