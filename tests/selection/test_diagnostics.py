"""Numbers and pictures of a selection: against their definitions, and the same bytes each time."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_proxies import POOL, PRIVATE, around

from mergekit_moe.recipe import Selection
from mergekit_moe.selection.diagnostics import CURVES, DIAGNOSTICS, MAP, diagnose, vendi_score, write_diagnostics
from mergekit_moe.selection.proxies import select_proxies
from mergekit_moe.selection.quality import coverage, squared_mmd

HELD_OUT = around(0, 40, 11)


def test_curves_are_measured_on_the_first_picks_by_texts_never_seen() -> None:
    chosen = select_proxies(POOL, PRIVATE, Selection(budget=40), name="a", seed=0)
    numbers = diagnose(POOL, chosen.rows, chosen.relevance, HELD_OUT, seed=0)
    for point in numbers["curves"]["selected"]:
        first = POOL[chosen.rows[: point["proxies"]]]
        assert point["squared_mmd"] == pytest.approx(squared_mmd(first, HELD_OUT), abs=1e-6)
        assert point["coverage"] == pytest.approx(coverage(first, HELD_OUT), abs=1e-4)
    last = {name: points[-1] for name, points in numbers["curves"].items()}
    assert last["selected"]["proxies"] == numbers["distinct"] == 40
    assert last["selected"]["squared_mmd"] < last["random"]["squared_mmd"]
    assert last["selected"]["coverage"] > last["random"]["coverage"]
    assert numbers["relevance_of_proxies"]["50%"] > numbers["relevance_of_pool"]["50%"]


def test_vendi_score_counts_distinct_rows() -> None:
    rows = np.repeat(np.eye(5), 3, axis=0)
    assert vendi_score(rows @ rows.T) == pytest.approx(5)
    assert vendi_score(np.ones((7, 7))) == pytest.approx(1)


def test_files_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    chosen = select_proxies(POOL, PRIVATE, Selection(budget=40), name="a", seed=0)
    texts = [f"public {i}" for i in range(len(POOL))]
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        write_diagnostics(POOL, chosen.rows, chosen.relevance, HELD_OUT, texts, seed=0, out=folder)
    for name in (DIAGNOSTICS, CURVES, MAP):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / MAP).read_bytes().startswith(b"\x89PNG")
    typical = json.loads((tmp_path / "one" / DIAGNOSTICS).read_text())["most_typical"][0]
    assert typical["text"] == texts[typical["row"]]
    assert chosen.relevance[typical["row"]] == chosen.relevance[chosen.rows].max()
