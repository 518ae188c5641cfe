"""Merging: exactly PEFT's own result, every tensor accounted for, bad experts refused by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FFN, PROJECTIONS, WITHOUT_PACKAGE, randomise, tiny_dense, tokens, write_adapter
from merging_tools import merge, read
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mergekit_moe.adapters import ADAPTER, ADAPTER_CONFIG
from mergekit_moe.checkpoint import read_header, shards_of, weights_fingerprint
from mergekit_moe.errors import ExpertError
from mergekit_moe.models import load_model


def test_the_base_passes_through_byte_for_byte(base_folder: Path, tmp_path: Path) -> None:
    out = merge(base_folder, [read(base_folder, write_adapter(base_folder, tmp_path / "a", 1))] * 2, tmp_path / "moe")
    base, merged = load_file(base_folder / "model.safetensors"), load_file(out / "model-00001-of-00003.safetensors")
    assert base.keys() == merged.keys()
    assert all(torch.equal(base[key], merged[key]) for key in base)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (base_folder / name).read_bytes() == (out / name).read_bytes()


def test_nothing_is_missing_or_left_over_on_loading(tmp_path: Path, family: str) -> None:
    """Also after a save by transformers, which may call tensors what it likes."""
    tiny_dense(family).save_pretrained(tmp_path / "base")
    targets = list(FFN.get(family, PROJECTIONS))
    adapter = write_adapter(tmp_path / "base", tmp_path / "a", 1, target_modules=targets)
    folded = write_adapter(tmp_path / "base", tmp_path / "b", 2, target_modules=targets, use_dora=True)
    out = merge(tmp_path / "base", [read(tmp_path / "base", folder) for folder in (adapter, folded)], tmp_path / "moe")
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model.save_pretrained(tmp_path / "again")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, again(tokens()).logits)


def test_a_sharded_base_is_read_through_its_index(base_folder: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base_folder).save_pretrained(sharded, max_shard_size="20KB")
    assert len(shards_of(sharded, "base")) > 2
    expert = read(base_folder, write_adapter(base_folder, tmp_path / "a", 1))
    models = [
        load_model(merge(base, [expert, expert], tmp_path / f"moe-{base.name}")) for base in (base_folder, sharded)
    ]
    with torch.no_grad():
        assert torch.equal(models[0](tokens()).logits, models[1](tokens()).logits)


def test_it_loads_where_mergekit_moe_is_not_installed(base_folder: Path, tmp_path: Path) -> None:
    """In a fresh process that can't import the package: same logits, and generate with the cache as without."""
    experts = [read(base_folder, write_adapter(base_folder, tmp_path / str(i), i), str(i)) for i in range(2)]
    out = merge(base_folder, experts, tmp_path / "moe")
    here = load_model(out).eval()
    randomise(here)
    here.save_pretrained(tmp_path / "saved")
    save_file({"ids": tokens(), "logits": here(tokens()).logits.detach()}, tmp_path / "expected.safetensors")
    script = """
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
expected = load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert "transformers_modules" in type(model).__module__
assert torch.equal(model(expected["ids"]).logits, expected["logits"])
settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
cached = model.generate(expected["ids"], **settings)
assert torch.equal(cached, model.generate(expected["ids"], use_cache=False, **settings))
model.save_pretrained(sys.argv[3])
again = AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True).eval()
assert torch.equal(again(expected["ids"]).logits, expected["logits"])
"""
    arguments = [tmp_path / "saved", tmp_path / "expected.safetensors", tmp_path / "again"]
    subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE + script, *map(str, arguments)], check=True, cwd=tmp_path)


def test_an_expert_of_another_size_is_named(base_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_dense(intermediate_size=64).save_pretrained(other)
    with pytest.raises(ExpertError, match=r"expert 'law': .*intermediate_size 64, the recipe's base has 48"):
        read(base_folder, write_adapter(other, tmp_path / "a", 1))


@pytest.mark.parametrize("layers", [2, 4])
def test_an_expert_of_another_depth_is_named(base_folder: Path, tmp_path: Path, layers: int) -> None:
    other = tmp_path / "other"
    tiny_dense(num_hidden_layers=layers).save_pretrained(other)
    with pytest.raises(ExpertError, match=r"expert 'law': adapter_model.safetensors (holds|lacks) .*layers"):
        read(base_folder, write_adapter(other, tmp_path / "a", 1))


def test_an_expert_of_other_weights_is_named(base_folder: Path, tmp_path: Path) -> None:
    folder = write_adapter(base_folder, tmp_path / "a", 1)
    (folder / "expert.json").write_text(json.dumps({"base_weights": "f" * 64}))
    with pytest.raises(ExpertError, match="expert 'law': it was trained on another base model"):
        read(base_folder, folder, base_weights=lambda: weights_fingerprint(base_folder, "base_model"))


def _truncate(folder: Path) -> None:
    (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:-100])


def _pickle(folder: Path) -> None:
    torch.save({"a": torch.zeros(2)}, folder / ADAPTER)


def _header_bomb(folder: Path) -> None:
    (folder / ADAPTER).write_bytes((2**62).to_bytes(8, "little") + b"{}")


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / ADAPTER)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "where its header promises"),
        (_pickle, "is not a safetensors file"),
        (_header_bomb, "is not a safetensors file"),
        (_drop_tensor, "lacks base_model.model.model.layers.0"),
        (lambda folder: (folder / ADAPTER).unlink(), "adapter_model.safetensors is missing"),
        (lambda folder: (folder / ADAPTER_CONFIG).unlink(), "has neither adapter_config.json, of an adapter"),
        (lambda folder: (folder / ADAPTER_CONFIG).write_text("{"), "adapter_config.json is not valid JSON"),
        (lambda folder: (folder / ADAPTER_CONFIG).write_text("[]"), "adapter_config.json is not a JSON object"),
        (lambda folder: (folder / ADAPTER_CONFIG).write_text('{"peft_type": "IA3"}'), "says peft_type 'IA3'"),
    ],
)
def test_a_damaged_expert_is_named(base_folder: Path, tmp_path: Path, damage: Any, message: str) -> None:
    folder = write_adapter(base_folder, tmp_path / "a", 1)
    damage(folder)
    with pytest.raises(ExpertError) as error:
        read(base_folder, folder)
    assert str(error.value).startswith("expert 'law': ")
    assert message in str(error.value)


def test_a_value_that_is_not_finite_ends_the_merge_with_its_name(base_folder: Path, tmp_path: Path) -> None:
    folder = write_adapter(base_folder, tmp_path / "a", 1)
    tensors = load_file(folder / ADAPTER)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[key][3, 2] = float("nan")
    save_file(tensors, folder / ADAPTER)
    with pytest.raises(ExpertError, match=f"expert 'law': {key} holds NaN"):
        merge(base_folder, [read(base_folder, folder)] * 2, tmp_path / "moe")


def test_an_index_that_points_outside_or_at_nothing_is_refused(base_folder: Path) -> None:
    (base_folder / "model.safetensors").rename(base_folder / "shard.safetensors")
    index = base_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ExpertError, match="not a plain file name"):
        shards_of(base_folder, "base_model")
    index.write_text(json.dumps({"weight_map": {"a": "shard.safetensors"}}))
    with pytest.raises(ExpertError, match=r"puts a in shard.safetensors, which doesn't have it"):
        shards_of(base_folder, "base_model")


def test_headers_are_what_safetensors_wrote(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 2), "b": torch.zeros(1, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors", "x")
    assert {name: (tensor["dtype"], tensor["shape"]) for name, tensor in header.items()} == {
        "a": ("F32", [3, 2]),
        "b": ("BF16", [1]),
    }
