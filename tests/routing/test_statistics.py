"""Statistics of one expert: what they depend on, and that sums kept on disk fit as a pass over all proxies does."""

from pathlib import Path

import pytest
import torch
from conftest import write_adapter
from datasets import concatenate_datasets
from merging_tools import merge, read
from safetensors.torch import load_file
from test_training import proxies

from mergekit_moe.models import load_model
from mergekit_moe.router_recipe import Router
from mergekit_moe.routing import start
from mergekit_moe.routing.statistics import STATISTICS, RoutingStatistics, read_statistics, write_statistics
from mergekit_moe.routing.training import fit_routers, gather_expert, hold_out

ROWS = proxies(60)
SETTINGS = Router(training=None)


@pytest.fixture
def merged(base_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """Two unified models that have two experts in common, in other places among others."""
    folders = {name: write_adapter(base_folder, tmp_path / name, i, r=2 + i) for i, name in enumerate("abcd")}
    return {
        names: merge(base_folder, [read(base_folder, folders[name], name) for name in names], tmp_path / names, **extra)
        for names, extra in {"abc": {}, "dcb": {"top_k": 2}}.items()
    }


def gathered(model: Path, out: Path, base: Path | None = None) -> dict[str, Path]:
    """Gather each expert's statistics over its own rows, which go by its name and not by its place."""
    folders = {}
    for number, name in enumerate(model.name):
        own = ROWS.select([row for row, owner in enumerate(ROWS["expert"]) if owner == "abcd".index(name) % 3])
        own = own.remove_columns("expert").add_column("expert", [number] * len(own))
        folders[name] = out / name
        folders[name].mkdir(parents=True)
        gather_expert(model, own, SETTINGS, folders[name], base=base)
    return folders


def test_an_experts_statistics_depend_on_no_other_expert(merged: dict[str, Path], tmp_path: Path) -> None:
    here, there = (gathered(model, tmp_path / f"of-{names}") for names, model in merged.items())
    for name in "bc":
        one, other = (load_file(folders[name] / STATISTICS) for folders in (here, there))
        assert one["count"] == other["count"] > 0
        torch.testing.assert_close(one["total"], other["total"], atol=1e-4, rtol=1e-6)
        torch.testing.assert_close(one["covariance"], other["covariance"], atol=1e-4, rtol=1e-5)
    assert not torch.equal(load_file(here["b"] / STATISTICS)["total"], load_file(here["c"] / STATISTICS)["total"])


def test_what_is_kept_is_the_pass_over_all_proxies(merged: dict[str, Path], base_folder: Path, tmp_path: Path) -> None:
    kept = read_statistics(list(gathered(merged["abc"], tmp_path / "kept", base_folder).values()))
    whole = start.gather_for(load_model(merged["abc"]), hold_out(ROWS)[0], SETTINGS, base_folder)
    assert torch.equal(kept.count, whole.count)
    torch.testing.assert_close(kept.total, whole.total, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(kept.second, whole.second, atol=1e-3, rtol=1e-5)
    for fit in (start.lda, start.ridge):
        for one, other in zip(fit(kept, 0.1), fit(whole, 0.1), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_fit_by_what_is_kept_reads_no_proxy_but_those_that_judge(
    merged: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = gathered(merged["abc"], tmp_path / "kept")
    monkeypatch.setattr(start, "gather_statistics", None)
    out = tmp_path / "model"
    out.mkdir()
    fit_routers(merged["abc"], ROWS, SETTINGS, published={}, seed=0, out=out, gathered=list(folders.values()))
    weights, biases = start.lda(read_statistics(list(folders.values())), SETTINGS.shrinkage)
    state = load_model(out).state_dict()
    for layer in range(3):
        assert torch.equal(state[f"model.layers.{layer}.mlp.router.weight"], weights[layer])
        assert torch.equal(state[f"model.layers.{layer}.mlp.router.bias"], biases[layer])


def test_what_is_kept_is_close_where_a_common_mean_is_a_thousand_times_the_spread(tmp_path: Path) -> None:
    """The case that float32 of the plain sums would lose: the covariance is a millionth of them."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    parts, folders = [], []
    for expert in range(3):
        features = 1000.0 + torch.randn(50, 8, generator=generator).double() + expert
        total = features.sum(0)[None, None]
        parts.append(RoutingStatistics(torch.tensor([50.0]).double(), total, (features.T @ features / 50.0)[None]))
        folders.append(tmp_path / str(expert))
        folders[-1].mkdir()
        write_statistics(parts[-1], 0, folders[-1])
    exact = RoutingStatistics(
        torch.cat([part.count for part in parts]),
        torch.cat([part.total for part in parts], dim=1),
        torch.stack([part.second for part in parts]).mean(0),
    )
    for fit in (start.lda, start.ridge):
        for one, other in zip(fit(read_statistics(folders), 0.0), fit(exact, 0.0), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_rows_to_judge_by_are_each_experts_own() -> None:
    """Every tenth of an expert's, whether the others' are there or not."""
    apart = [hold_out(ROWS.select(range(expert, len(ROWS), 3))) for expert in range(3)]
    for side in (0, 1):
        together = hold_out(ROWS)[side]
        joined = concatenate_datasets([parts[side] for parts in apart])
        assert sorted(together["input_ids"]) == sorted(joined["input_ids"])
