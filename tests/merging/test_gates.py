"""Routers that need no proxies: what they are made of, and that each expert's row is its own."""

from pathlib import Path

import pytest
import torch
from conftest import tokens, write_adapter
from merging_tools import base_of, merge, read
from safetensors.torch import load_file, save_file
from test_fine_tunes import fine_tune

from mergekit_moe.experts import Expert
from mergekit_moe.merging.gates import GATES, arrow
from mergekit_moe.models import load_model, routers_of
from mergekit_moe.recipe import Router


@pytest.fixture
def experts(base_folder: Path, tmp_path: Path) -> list[Expert]:
    return [
        read(base_folder, write_adapter(base_folder, tmp_path / "a", 1, r=3), "plain"),
        read(base_folder, write_adapter(base_folder, tmp_path / "p", 2, rank_pattern={"gate_proj": 2}), "pattern"),
        read(base_folder, write_adapter(base_folder, tmp_path / "d", 3, use_dora=True), "dora"),
        read(base_folder, fine_tune(base_folder, tmp_path / "t", 4), "tuned"),
    ]


def test_arrow_is_the_first_right_singular_vector_of_what_was_changed(base_folder: Path, experts: list[Expert]) -> None:
    base = base_of(base_folder)
    for expert in experts:
        for layer in range(3):
            names = [f"model.layers.{layer}.mlp.{name}.weight" for name in ("gate_proj", "up_proj")]
            owns = [base.weights.read(name).double() for name in names]
            change = torch.cat([expert.updates[n].apply(own) - own for n, own in zip(names, owns, strict=True)])
            first = torch.linalg.svd(change).Vh[0]
            row = arrow(base, expert, expert.name, layer, 0).double()
            assert float((row @ first).abs()) == pytest.approx(1.0, abs=1e-4)
            assert float(row.norm()) == pytest.approx(1.0, abs=1e-5)


def test_arrow_routes_by_absolute_scores_and_never_to_the_anchor(
    base_folder: Path, tmp_path: Path, experts: list[Expert]
) -> None:
    router = Router(start="arrow", context="none")
    model = load_model(merge(base_folder, experts, tmp_path / "moe", router, anchor=True)).eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in routers_of(model):
        module.register_forward_hook(lambda _, args, logits: seen.append((args[0], logits)))
    with torch.no_grad():
        model(tokens())
    for module, (hidden, logits) in zip(routers_of(model), seen, strict=True):
        torch.testing.assert_close(logits, (hidden @ module.weight.T).abs(), atol=1e-6, rtol=0)
        assert (logits.argmax(-1) != 4).all()


@pytest.mark.parametrize("start", GATES)
def test_a_row_depends_on_its_own_expert_alone(
    base_folder: Path, tmp_path: Path, experts: list[Expert], start: str
) -> None:
    settings = {"uniform": 4}.get(start, 1)
    router = Router(start=start)
    whole = routers_of(load_model(merge(base_folder, experts, tmp_path / "moe", router, top_k=settings)))
    fewer = routers_of(load_model(merge(base_folder, experts[::-2], tmp_path / "two", router)))
    for one, other in zip(whole, fewer, strict=True):
        assert torch.equal(one.weight[[3, 1]], other.weight)


def test_uniform_with_all_experts_is_their_mean(base_folder: Path, tmp_path: Path, experts: list[Expert]) -> None:
    model = load_model(merge(base_folder, experts[:2], tmp_path / "moe", Router(start="uniform"), top_k=2)).eval()
    ffn = model.model.layers[0].mlp
    outputs: list[torch.Tensor] = []
    ffn.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        for forced in (None, torch.tensor([0, 0]), torch.tensor([1, 1])):
            model(tokens(), forced_expert=forced)
    torch.testing.assert_close(outputs[0], (outputs[1] + outputs[2]) / 2, atol=1e-5, rtol=1e-5)


def test_random_rows_follow_the_seed(base_folder: Path, experts: list[Expert]) -> None:
    base = base_of(base_folder)
    rows = {(seed, layer): GATES["random"](base, None, "law", layer, seed) for seed in (0, 1) for layer in (0, 1)}
    assert torch.equal(rows[0, 0], GATES["random"](base, None, "law", 0, 0))
    assert len({tuple(row.tolist()) for row in rows.values()}) == 4


def test_a_layer_that_was_left_alone_has_no_direction(base_folder: Path, tmp_path: Path) -> None:
    tuned = fine_tune(base_folder, tmp_path / "t", 1)
    tensors, own = load_file(tuned / "model.safetensors"), load_file(base_folder / "model.safetensors")
    tensors.update({name: own[name] for name in own if ".layers.1.mlp." in name})
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    adapter = write_adapter(base_folder, tmp_path / "a", 1)
    factors = load_file(adapter / "adapter_model.safetensors")
    factors.update({name: 0 * factors[name] for name in factors if ".layers.1." in name and "lora_B" in name})
    save_file(factors, adapter / "adapter_model.safetensors")
    for folder in (tuned, adapter):
        rows = [arrow(base_of(base_folder), read(base_folder, folder), "x", layer, 0) for layer in range(3)]
        assert [float(row.norm()) for row in rows] == pytest.approx([1.0, 0.0, 1.0])
