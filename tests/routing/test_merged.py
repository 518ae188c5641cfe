"""What a user sees of routers in a merged model: strangers' text, and an expert whose published vector is too long."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOS, tokens, write_adapter
from datasets import Dataset
from merging_tools import merge, read
from safetensors.torch import load_file, save_file
from test_training import said_by

from mergekit_moe.evaluation.scoring import Domain, by_model, routing_of, score
from mergekit_moe.models import load_model
from mergekit_moe.recipe import Evaluation, Router
from mergekit_moe.routing.statistics import gather_statistics
from mergekit_moe.routing.training import fit_routers

SETTINGS = Evaluation()
CLOSED = {"training": None, "max_length": 32, "shrinkage": 0.1}


@pytest.fixture
def experts(base_folder: Path, tmp_path: Path) -> list[Any]:
    """Three, of a base with the two habits of real ones that a random one lacks.

    It is sure of what it says, so that it matters who reads a text; and its tokens share a mean.
    """
    file = base_folder / "model.safetensors"
    weights = load_file(file)
    embeddings, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    mean = torch.randn(embeddings.shape[1], generator=torch.Generator().manual_seed(1))
    shared = embeddings + 2.0 * embeddings.std() * mean
    save_file({**weights, "model.embed_tokens.weight": shared, "lm_head.weight": 20.0 * head}, file, {"format": "pt"})
    found = []
    for i, name in enumerate("abc"):
        folder = write_adapter(base_folder, tmp_path / name, i)
        (folder / "expert.json").write_text(json.dumps({"domain_free_token_ids": [BOS]}))
        found.append(read(base_folder, folder, name))
    return found


def rows_of(*domains: int, seed: int = 0) -> Dataset:
    """Rows of each domain, by expert: it draws from five tokens of its own; domain 3 is nobody's."""
    made = []
    for domain in domains:
        for i in range(40):
            ids = tokens(1, 24, seed=1000 * seed + 100 * domain + i)[0]
            ids[1:] = 10 + 5 * domain + ids[1:] % 5
            made.append({"input_ids": ids.tolist(), "labels": ids.tolist(), "expert": domain})
    return Dataset.from_list(made)


def fitted(base: Path, experts: list[Any], rows: Dataset, out: Path, router: Router, **given: Any) -> Any:
    merged = merge(base, experts, out / "merged", router, anchor=given.pop("anchor", False))
    (out / "model").mkdir()
    fit_routers(merged, rows, router, published=given, seed=0, out=out / "model", base=base)
    return load_model(out / "model").eval()


def test_the_anchor_keeps_a_strangers_text_with_the_seed(base_folder: Path, tmp_path: Path, experts: list[Any]) -> None:
    seed = load_model(base_folder).eval()
    judged = rows_of(3, seed=1).map(lambda row: {"labels": said_by(seed, row["input_ids"])})

    def loss(model: Any) -> float:
        return score(by_model(model), judged, SETTINGS, "cpu")["loss"]

    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    known, router = rows_of(0, 1, 2), Router(**CLOSED)
    anchored = fitted(base_folder, experts, rows_of(0, 1, 2, 3), tmp_path / "with", router, anchor=True)
    lost = fitted(base_folder, experts, known, tmp_path / "without", router)
    assert loss(anchored) == pytest.approx(loss(seed), rel=0.01)
    assert loss(lost) > 1.05 * loss(seed), "without it, some expert reads what it never learnt"
    own = score(by_model(anchored), known, SETTINGS, "cpu")["loss"]
    assert own == pytest.approx(score(by_model(lost), known, SETTINGS, "cpu")["loss"], rel=0.05)


@pytest.mark.parametrize(("start", "least", "most"), [("centroid", 0.0, 0.05), ("means", 0.9, 1.0)])
def test_ten_times_a_published_vector_wins_no_traffic_but_as_the_paper_has_it(
    base_folder: Path, tmp_path: Path, experts: list[Any], start: str, least: float, most: float
) -> None:
    rows = rows_of(0, 1, 2)
    blank = load_model(merge(base_folder, experts, tmp_path / "blank")).eval()
    found = gather_statistics(blank, rows, context_weight=0.95, batch_size=8)
    sums = found.total.transpose(0, 1).clone()
    sums[0] *= 10
    given = {"count": found.count, "sum": sums.transpose(0, 1), "noise": torch.zeros(sums.shape[1], 3)}
    (tmp_path / "out").mkdir()
    model = fitted(base_folder, experts, rows, tmp_path / "out", Router(start=start, **CLOSED), **given)
    taken = [routing_of(model, Domain(0, "a", rows_of(other, seed=1)), SETTINGS)["accuracy"] for other in (1, 2)]
    assert all(least <= share <= most for share in taken)
    assert math.isfinite(score(by_model(model), rows, SETTINGS, "cpu")["loss"])
