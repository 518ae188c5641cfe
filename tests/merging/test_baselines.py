"""Dense merges: each against PEFT's own functions on the same changes, and streamed as the rest."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tokens, write_adapter
from merging_tools import base_of, read
from peft.utils import merge_utils
from safetensors.torch import load_file
from test_fine_tunes import fine_tune
from transformers import AutoModelForCausalLM

from mergekit_moe.experts import Expert
from mergekit_moe.merging.baselines import BASELINES, merge_densely
from mergekit_moe.recipe import Merge

SHAPE = (37, 29)


def changes(seed: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def combine(method: str, given: list[torch.Tensor], seed: int = 0, **settings: Any) -> torch.Tensor:
    return BASELINES[method](given, Merge(method=method, **settings), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
def test_soup_and_task_arithmetic_equal_peft(seed: int) -> None:
    given = changes(seed)
    expected = merge_utils.task_arithmetic(given, torch.full((3,), 1 / 3))
    torch.testing.assert_close(combine("soup", given), expected, atol=1e-6, rtol=0)
    expected = merge_utils.task_arithmetic(given, torch.full((3,), 0.7))
    torch.testing.assert_close(combine("task-arithmetic", given, scaling=0.7), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_ties_equals_peft(seed: int, density: float) -> None:
    given = changes(seed)
    expected = merge_utils.ties(given, torch.full((3,), 1.3), density)
    torch.testing.assert_close(combine("ties", given, scaling=1.3, density=density), expected, atol=1e-6, rtol=0)


def test_dare_keeps_each_value_scaled_up_or_drops_it_and_is_right_in_the_mean() -> None:
    given = changes(0, 1)
    drawn = torch.stack([combine("dare", given, seed, scaling=1.0, density=0.25) for seed in range(4000)])
    kept = drawn != 0
    torch.testing.assert_close(drawn, torch.where(kept, given[0] / 0.25, 0), atol=1e-6, rtol=0)
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=2e-3)
    torch.testing.assert_close(drawn.mean(0), given[0], atol=0.12 * float(given[0].abs().max()), rtol=0)


@pytest.fixture
def experts(base_folder: Path, tmp_path: Path) -> list[Expert]:
    return [
        read(base_folder, fine_tune(base_folder, tmp_path / "t", 1, others=True), "tuned"),
        read(base_folder, write_adapter(base_folder, tmp_path / "a", 1, target_modules=["q_proj", "up_proj"])),
        read(base_folder, write_adapter(base_folder, tmp_path / "d", 2, use_dora=True), "dora"),
    ]


@pytest.mark.parametrize("method", BASELINES)
def test_every_weight_of_the_model_is_merged(
    base_folder: Path, tmp_path: Path, experts: list[Expert], method: str
) -> None:
    for out in (tmp_path / "one", tmp_path / "two"):
        out.mkdir()
        merge_densely(base_of(base_folder), experts, Merge(method=method), out=out, seed=5)
    merged = load_file(tmp_path / "one" / "model.safetensors")
    assert all(
        torch.equal(merged[name], other) for name, other in load_file(tmp_path / "two/model.safetensors").items()
    )
    weights = base_of(base_folder).weights
    assert merged.keys() == set(weights)
    if method != "dare":
        for name in weights:
            base = weights.read(name)
            given = [
                e.updates[name].apply(base) - base if name in e.updates else torch.zeros_like(base) for e in experts
            ]
            change = BASELINES[method](given, Merge(method=method), torch.Generator())
            torch.testing.assert_close(merged[name], base + change, atol=1e-6, rtol=0)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config == json.loads((base_folder / "config.json").read_text())
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.isfinite(model(tokens()).logits).all()


def test_the_soup_of_one_model_twice_is_that_model(base_folder: Path, tmp_path: Path, experts: list[Expert]) -> None:
    (tmp_path / "out").mkdir()
    merge_densely(base_of(base_folder), [experts[0]] * 2, Merge(method="soup"), out=tmp_path / "out")
    merged, tuned = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "t" / "model.safetensors")
    for name, tensor in tuned.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)
