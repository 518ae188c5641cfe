"""Experts: only FFN LoRA trains, BOS stays silent, and what is published is a plain PEFT adapter."""

import json
from pathlib import Path

import pytest
import torch
from conftest import randomise, tokens, write_adapter
from datasets import Dataset
from killing import Killed, kill_at
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mergekit_moe.alignment import align_expert
from mergekit_moe.errors import DataError
from mergekit_moe.experts import STATISTICS
from mergekit_moe.models import adapter_silent_on
from mergekit_moe.publication import publish_expert
from mergekit_moe.recipe import Alignment

BOS = 1
SETTINGS = Alignment(max_steps=4, batch_size=4, warmup_steps=0, rank=2, alpha=4, learning_rate=1e-2, max_length=32)


def text_rows(n: int = 8) -> Dataset:
    row = {"prompt": "the quick ", "completion": "brown fox jumps 123", "tag": ""}
    return Dataset.from_list([{"id": str(i), **row} for i in range(n)])


def align(base: Path, out: Path, settings: Alignment = SETTINGS) -> Path:
    out.mkdir()
    align_expert(base, text_rows(), settings, name="law", seed=0, out=out)
    return out


def test_an_expert_is_a_plain_adapter_on_the_ffn_alone(base_folder: Path, tmp_path: Path) -> None:
    out = align(base_folder, tmp_path / "law")
    keys = load_file(out / "adapter_model.safetensors")
    assert len(keys) == 3 * 3 * 2
    assert all(".mlp." in key for key in keys)
    assert all(tensor.abs().max() > 0 for tensor in keys.values()), "every factor has moved"


def test_training_lowers_the_loss_and_is_deterministic(base_folder: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_steps": 40})
    folders = [align(base_folder, tmp_path / name, settings) for name in ("a", "b")]
    log = json.loads((folders[0] / "training_log.json").read_text())
    assert float(log[-1]["loss"]) < float(log[0]["loss"]) - 0.5
    assert (folders[0] / "adapter_model.safetensors").read_bytes() == (
        folders[1] / "adapter_model.safetensors"
    ).read_bytes()


def test_a_killed_alignment_goes_on_and_ends_with_the_same_bytes(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout draws random numbers at every step: they go on where they were."""
    settings = SETTINGS.model_copy(update={"max_steps": 10, "dropout": 0.3})
    whole = align(base_folder, tmp_path / "whole", settings)
    killed = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(4, patch)
        align(base_folder, killed, settings)
    align_expert(base_folder, text_rows(), settings, name="law", seed=0, out=killed)
    assert {file.name for file in killed.iterdir()} == {file.name for file in whole.iterdir()}
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()


def test_the_adapter_is_silent_on_bos_and_only_there(base_folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["up_proj", "gate_proj", "down_proj"])
    model, ids = get_peft_model(base, config).eval(), tokens()
    randomise(model)
    differences = {}
    with torch.no_grad():
        for layer in (0, 1):
            ffn = model.base_model.model.model.layers[layer].mlp
            seen: list[torch.Tensor] = []
            handle = ffn.register_forward_hook(lambda m, args, out, seen=seen: seen.extend([args[0], out]))
            with adapter_silent_on(model, [BOS]):
                model(input_ids=ids)
            handle.remove()
            with model.disable_adapter():
                differences[layer] = (seen[1] - ffn(seen[0])).abs().amax(-1)
    for difference in differences.values():
        assert torch.equal(difference[:, 0], torch.zeros(2))
        assert difference[:, 1:].min() > 0


def test_hooks_are_gone_after_training(base_folder: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["up_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
    with adapter_silent_on(model, [BOS]):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_rows_with_nothing_to_learn_are_named(base_folder: Path, tmp_path: Path) -> None:
    rows = text_rows().map(lambda row: {"prompt": "word " * 200})
    with pytest.raises(DataError, match=r"expert 'law': no row has a token to learn within alignment.max_length 32"):
        align_expert(base_folder, rows, SETTINGS, name="law", seed=0, out=tmp_path)


def test_the_published_folder_loads_with_peft_and_its_statistics_are_exact(base_folder: Path, tmp_path: Path) -> None:
    aligned = write_adapter(base_folder, tmp_path / "aligned", 1)
    out = tmp_path / "out"
    out.mkdir()
    about = {"base_model": "org/seed", "base_revision": None, "domain_free_token_ids": [BOS]}
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (3, 5, 9)]
    proxies = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    publish_expert(aligned, base_folder, about=about, proxies={"rows": [0, 1, 2]}, proxy_tokens=proxies, out=out)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/seed", "no path of this machine"

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), out).eval()
    published = load_file(out / STATISTICS)
    inputs: list[torch.Tensor] = []
    model.base_model.model.model.layers[2].mlp.register_forward_pre_hook(lambda m, args: inputs.append(args[0][0, 1:]))
    with torch.no_grad(), adapter_silent_on(model, [BOS]):
        for row in rows:
            model(input_ids=torch.tensor([row]))
    hidden = torch.cat(inputs).double()
    assert published["layers.2.count"] == len(hidden) == 14
    torch.testing.assert_close(published["layers.2.sum"], hidden.sum(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(published["layers.2.sum_of_squares"], hidden.square().sum(0), atol=1e-4, rtol=0)
