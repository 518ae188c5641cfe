"""The stage on a merged model: what it writes, what it leaves alone, and what it goes back to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_adapter
from merging_tools import merge, read
from safetensors.torch import load_file
from test_training import proxies
from transformers import AutoModelForCausalLM

from mergekit_moe.checkpoint import INDEX, REPORT
from mergekit_moe.models import load_model
from mergekit_moe.router_recipe import Router, RouterTraining
from mergekit_moe.routing import training
from mergekit_moe.routing.start import Material
from mergekit_moe.routing.training import fit_routers, hold_out, start_routers, train_routers
from mergekit_moe.workspace import file_sha256

ROWS = proxies(30)


def fine_tune(base: Path, folder: Path, seed: int) -> Path:
    """Save the base with other FFNs."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["lora", "dense", "mixed"])
def merged(request: pytest.FixtureRequest, base_folder: Path, tmp_path: Path) -> Path:
    adapters = [write_adapter(base_folder, tmp_path / f"a{i}", i) for i in range(3)]
    tunes = [fine_tune(base_folder, tmp_path / f"t{i}", i) for i in range(3)]
    folders = {"lora": adapters, "dense": tunes, "mixed": [*adapters[:2], tunes[0]]}[request.param]
    return merge(base_folder, [read(base_folder, folder, folder.name) for folder in folders], tmp_path / "merged")


def fit(merged: Path, out: Path, **training: Any) -> dict[str, Any]:
    """Fit routers and experts into the folder `out`; return the report."""
    out.mkdir(exist_ok=True)
    asked = {"trains": "router+experts", "max_steps": 20, "batch_size": 8, "learning_rate": 1e-2, **training}
    settings = Router(training=RouterTraining(**asked))
    fit_routers(merged, ROWS, settings, published={}, seed=0, out=out)
    return json.loads((out / "router_training.json").read_text())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_trained_experts_are_written_and_the_seed_s_weights_are_the_same_file(merged: Path, tmp_path: Path) -> None:
    before = {file.name: file_sha256(file) for file in merged.iterdir()}
    report = fit(merged, tmp_path / "model")
    assert report["kept"] == "trained"
    old, new = tensors(merged), tensors(tmp_path / "model")
    assert old.keys() == new.keys()
    differing = {name for name in old if not torch.equal(old[name], new[name])}
    assert differing == {name for name in old if ".router." in name or ".experts." in name}
    weight_map = json.loads((merged / INDEX).read_text())["weight_map"]
    seeds = {shard for name, shard in weight_map.items() if ".router." not in name and ".experts." not in name}
    assert seeds
    assert all((merged / shard).samefile(tmp_path / "model" / shard) for shard in seeds)
    assert before == {file.name: file_sha256(file) for file in merged.iterdir()}
    assert json.loads((tmp_path / "model" / REPORT).read_text())["experts_trained"]


def test_what_is_written_is_what_was_trained(merged: Path, tmp_path: Path) -> None:
    fit(merged, tmp_path / "model")
    model, (learnt, _) = load_model(merged), hold_out(ROWS)
    asked = RouterTraining(trains="router+experts", max_steps=20, batch_size=8, learning_rate=1e-2)
    start_routers(Material(model, learnt, Router(training=asked), 0, {}, None, []))
    train_routers(model, learnt, asked, seed=0, folder=tmp_path / "again")
    written = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())


def test_a_training_that_made_things_worse_is_undone_in_the_experts_too(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = iter([{"loss": 1.0}, {"loss": 2.0}])
    monkeypatch.setattr(training, "judge", lambda model, rows: next(verdicts))
    report = fit(merged, tmp_path / "model", max_steps=3)
    assert report["kept"] == "lda"
    old, new = tensors(merged), tensors(tmp_path / "model")
    differing = {name for name in old if not torch.equal(old[name], new[name])}
    assert differing
    assert all(".router." in name for name in differing)


@pytest.mark.parametrize("start", ["lda", "arrow"])
def test_the_report_tells_of_the_router_that_was_fitted_and_not_of_the_merge_s(
    start: str, merged: Path, tmp_path: Path
) -> None:
    """The recipe may have changed in between, and add-expert goes by it; what needs no proxies isn't fitted on them."""
    (tmp_path / "model").mkdir()
    settings = Router(start=start, shrinkage=0.3, max_length=64, leave_out_ambiguous=start == "lda")
    fit_routers(merged, ROWS, settings, published={}, seed=0, out=tmp_path / "model")
    report = json.loads((tmp_path / "model" / REPORT).read_text())
    assert Router(**report["router"]) == settings
    assert report["routers_fitted"] == (start == "lda")
    fitted = json.loads((tmp_path / "model/router_training.json").read_text())
    if start == "lda":
        assert fitted["left_out"].keys() == {expert["name"] for expert in report["experts"]}


def test_files_that_a_killed_run_left_are_written_again(merged: Path, tmp_path: Path) -> None:
    before = {file.name: file_sha256(file) for file in merged.iterdir()}
    fit(merged, tmp_path / "model")
    first = tensors(tmp_path / "model")
    fit(merged, tmp_path / "model")
    again = tensors(tmp_path / "model")
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert before == {file.name: file_sha256(file) for file in merged.iterdir()}
