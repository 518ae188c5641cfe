"""Any LoRA adapter that PEFT writes: read from its own file, it gives the weights that PEFT's own merge gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FFN, PROJECTIONS, randomise, tiny_dense, tokens, write_adapter
from merging_tools import base_of, merge, read
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mergekit_moe.architectures import ARCHITECTURES
from mergekit_moe.errors import ExpertError
from mergekit_moe.evaluation.compare import _expert_losses
from mergekit_moe.merging.unify import merge_experts
from mergekit_moe.models import load_model
from mergekit_moe.recipe import Evaluation, Merge, Router
from mergekit_moe.updates import Update

ALL = ["q_proj", "v_proj", "o_proj", *PROJECTIONS]
# Family and adapter settings; the first half changes FFNs alone.
GRID: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"r": 1, "lora_alpha": 3}),
    ("Llama", {"r": 8, "lora_alpha": 5, "use_rslora": True}),
    ("Llama", {"target_modules": ["down_proj"], "r": 5, "lora_alpha": 7}),
    ("Llama", {"rank_pattern": {"up_proj": 2, "layers.1.mlp.down_proj": 7}}),
    ("Llama", {"alpha_pattern": {"gate_proj": 1, "layers.2.mlp.up_proj": 9}}),
    ("Llama", {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 5}, "use_rslora": True}),
    ("Llama", {"target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
    ("Llama", {"layers_to_transform": [0, 2]}),
    ("Llama", {"exclude_modules": ["model.layers.0.mlp.up_proj"]}),
    ("Llama", {"fan_in_fan_out": True}),
    ("Llama", {"init_lora_weights": "gaussian"}),
    ("Llama", {"use_dora": True}),
    ("Llama", {"use_dora": True, "use_rslora": True, "r": 3}),
    ("Llama", {"modules_to_save": ["down_proj"], "target_modules": ["up_proj", "gate_proj"]}),
    ("Phi", {"bias": "lora_only"}),
    ("Phi", {"lora_bias": True}),
    ("GPTNeoX", {"lora_bias": True, "use_rslora": True}),
    ("Starcoder2", {"r": 3}),
    ("Phi3", {"r": 2, "target_modules": ["gate_up_proj", "down_proj"]}),
    ("Gemma2", {"alpha_pattern": {"up_proj": 2.5}}),
    ("Qwen3", {"use_dora": True, "target_modules": ["down_proj"]}),
    ("Phi", {"bias": "all"}),
    ("Llama", {"target_modules": ALL}),
    ("Llama", {"target_modules": ALL, "use_dora": True, "rank_pattern": {"q_proj": 3}}),
    ("Llama", {"target_modules": [*PROJECTIONS, "embed_tokens"]}),
    ("Llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    ("Llama", {"target_modules": ["layers.0.mlp.up_proj", "model.layers.2.mlp.down_proj"]}),
    ("Llama", {"target_modules": [*PROJECTIONS, "embed_tokens"], "use_dora": True}),
    ("Llama", {"modules_to_save": ["input_layernorm"], "target_modules": ALL}),
]


def published(family: str, settings: dict[str, Any], folder: Path, seed: int) -> tuple[Path, Path, PreTrainedModel]:
    """Return a base, an adapter of it, and PEFT's own merge of the two, in float64."""
    base = folder / "base"
    dense = tiny_dense(family, seed=seed)
    randomise(dense, seed)
    dense.save_pretrained(base)
    settings = {"target_modules": list(FFN.get(family, PROJECTIONS)), **settings}
    adapter = write_adapter(base, folder / "adapter", seed, **settings)
    spoil_what_training_would_change(adapter, seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return base, adapter, PeftModel.from_pretrained(model, adapter).double().merge_and_unload()


def spoil_what_training_would_change(adapter: Path, seed: int) -> None:
    """Fresh adapters save biases, norms and magnitudes as they were; random ones tell whether they are read."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in tensors.items():
        if "base_layer.weight" not in key:
            # Small, as what is trained is: a product of large numbers has no 1e-6 in float32.
            tensors[key] = 0.2 * tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("family", "settings"), GRID, ids=str)
def test_every_tensor_equals_peft_merge_and_unload(
    tmp_path: Path, family: str, settings: dict[str, Any], seed: int
) -> None:
    base, adapter, merged = published(family, settings, tmp_path, seed)
    expert, weights = read(base, adapter), base_of(base).weights
    theirs = merged.state_dict()
    theirs["embed_out.weight"] = theirs["lm_head.weight"]  # as GPT-NeoX calls it on disk
    changed = {name for name in weights if not torch.equal(weights.read(name).double(), theirs[name])}
    assert changed <= expert.updates.keys()
    for name, update in expert.updates.items():
        single, double = update.apply(weights.read(name)), update.apply(weights.read(name).double())
        # PEFT keeps an embedding's factors in float32.
        torch.testing.assert_close(double, theirs[name], atol=1e-6 if update.turned else 1e-9, rtol=0)
        torch.testing.assert_close(single.double(), theirs[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("family", "settings"), GRID[:22], ids=str)
def test_a_pinned_expert_equals_peft_merge_and_unload(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    base, adapter, merged = published(family, settings, tmp_path, 3)
    plain = write_adapter(base, tmp_path / "plain", 4, target_modules=list(FFN.get(family, PROJECTIONS)))
    model = load_model(merge(base, [read(base, plain), read(base, adapter)], tmp_path / "moe")).eval().double()
    model.set_experts_implementation("eager")  # the grouped product of whole FFNs knows no float64
    with torch.no_grad():
        given = model(tokens(), forced_expert=torch.tensor([1, 1])).logits
        torch.testing.assert_close(given, merged(tokens()).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("family", "settings"), [GRID[4], GRID[6], GRID[7], GRID[8], GRID[20]], ids=str)
def test_patterns_and_restricted_layers_stay_factored(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    """Also through a save by transformers itself, which has to cut the fused ranks where they were."""
    base, adapter, merged = published(family, settings, tmp_path, 5)
    out = merge(base, [read(base, adapter)] * 2, tmp_path / "moe")
    config = json.loads((out / "config.json").read_text())
    assert all(expert.get("kind") != "dense" for expert in config["experts"])
    load_model(out).save_pretrained(tmp_path / "again")
    model = load_model(tmp_path / "again").eval().double()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, merged(tokens()).logits, atol=1e-6, rtol=0)


def test_a_change_of_low_rank_is_measured_without_being_formed(tmp_path: Path) -> None:
    base, adapter, _ = published("Llama", {"use_rslora": True}, tmp_path, 6)
    expert, weights = read(base, adapter), base_of(base).weights
    for name, update in expert.updates.items():
        formed = float(update.difference(weights.read(name).double()).square().sum())
        assert update.squared_norm(weights.read(name)) == pytest.approx(formed, rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "has init_lora_weights = 'pissa', which changes the base's own weights"),
        ({"init_lora_weights": "olora"}, "has init_lora_weights = 'olora', which changes the base's own weights"),
        ({"target_parameters": ["q_proj.weight"]}, "has target_parameters = "),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices = [3], a variant of LoRA"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "has layer_replication = "),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_merged_exactly_are_refused(
    base_folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExpertError) as error:
        read(base_folder, write_adapter(base_folder, tmp_path / "a", 1, **settings))
    assert str(error.value).startswith("expert 'law': adapter_config.json ")
    assert message in str(error.value)


def test_an_update_of_half_precision_is_rounded_once(base_folder: Path, tmp_path: Path) -> None:
    """The base in bfloat16: the sum is rounded, not the difference and then the sum."""
    expert = read(base_folder, write_adapter(base_folder, tmp_path / "a", 1))
    name, update = next(iter(expert.updates.items()))
    assert isinstance(update, Update)
    base = base_of(base_folder).weights.read(name).bfloat16()
    assert torch.equal(update.apply(base), update.apply(base.double()).bfloat16())


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["lm_head", "embed_tokens"]}, {"target_modules": [*PROJECTIONS, "lm_head"]}],
    ids=str,
)
def test_a_head_that_the_base_ties_is_left_out_and_told(tmp_path: Path, settings: dict[str, Any]) -> None:
    """As most small models do: there is no place for a head of its own; whoever wants to keep it all is refused."""
    tiny_dense(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    adapter = write_adapter(tmp_path / "base", tmp_path / "a", 1, **{"target_modules": list(PROJECTIONS), **settings})
    expert = read(tmp_path / "base", adapter)
    assert expert.untied == ("lm_head.weight",)
    told: list[str] = []
    (tmp_path / "moe").mkdir()
    merge_experts(base_of(tmp_path / "base"), [expert] * 2, Merge(), Router(), out=tmp_path / "moe", tell=told.append)
    assert "expert 'law': lm_head.weight, which the base ties to its embedding, left out" in told
    losses = _expert_losses(tmp_path / "base", {"law": adapter, "art": adapter}, [], Evaluation())
    assert losses.keys() == {"law", "art", "soup"}  # the soup has no place for it, either
    with pytest.raises(
        ExpertError, match=r"it trained lm_head.weight apart from the embedding, to which the base ties it"
    ):
        merge(tmp_path / "base", [expert] * 2, tmp_path / "average", other_weights="average")


def test_families_tie_their_heads_where_the_library_does() -> None:
    for name, architecture in ARCHITECTURES.items():
        if not architecture.encoder:  # which is used without a head
            assert architecture.tied == AutoConfig.for_model(name).tie_word_embeddings, name
