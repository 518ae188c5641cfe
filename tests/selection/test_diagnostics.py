"""Numbers and pictures of a selection: against their definitions, and the same bytes each time."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_proxies import POOL, PRIVATE, around

from mergekit_moe.recipe import Selection
from mergekit_moe.selection.diagnostics import (
    CURVES,
    DIAGNOSTICS,
    GAINS,
    MAP,
    diagnose,
    vendi_score,
    write_diagnostics,
)
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


def test_private_texts_are_drawn_only_when_asked(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    picked, relevance, texts = np.arange(12), rng.uniform(0.1, 1, 60), [f"text {i}" for i in range(60)]
    pictures = []
    for name, held_out, drawn in (("a", rows[40:50], False), ("b", rows[50:], False), ("c", rows[50:], True)):
        (tmp_path / name).mkdir()
        out = {"seed": 0, "out": tmp_path / name, "draw_private": drawn, "gains_K": -np.arange(12.0)}
        write_diagnostics(rows, picked, relevance, held_out, texts, **out)
        pictures.append((tmp_path / name / MAP).read_bytes())
        assert (tmp_path / name / GAINS).is_file()
    assert pictures[0] == pictures[1] != pictures[2]
