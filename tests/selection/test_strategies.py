"""Strategies and measures against their definitions, by brute force on fresh random rows."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from mergekit_moe.errors import SelectionError
from mergekit_moe.selection import strategies
from mergekit_moe.selection.quality import coverage, squared_mmd


def problem(n: int = 60, d: int = 8) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    rng = np.random.default_rng()
    rows = rng.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), rng.uniform(0.05, 1, n)


def greedy(value: Callable[[list[int]], float], n: int, budget: int) -> list[int]:
    picked: list[int] = []
    for _ in range(budget):
        left = [i for i in range(n) if i not in picked]
        picked.append(max(left, key=lambda i: value([*picked, i])))
    return picked


def test_facility_location_is_the_greedy_maximum_of_its_objective() -> None:
    for _ in range(10):
        rows, relevance = problem()
        cosines = np.maximum(rows.astype(np.float64) @ rows.T.astype(np.float64), 0)
        expected = greedy(lambda s: float(relevance @ cosines[:, s].max(axis=1)), 60, 20)  # noqa: B023
        assert strategies.facility_location(rows, relevance, 20).tolist() == expected


def test_facility_location_is_near_the_best_of_all_choices() -> None:
    """A greedy maximum of a monotone submodular function is at least 1 - 1/e of the greatest (Nemhauser et al.)."""
    rows, relevance = problem(12)
    cosines = np.maximum(rows @ rows.T, 0)

    def value(chosen: list[int]) -> float:
        return float(relevance @ cosines[:, chosen].max(axis=1))

    best = max(value(list(chosen)) for chosen in combinations(range(12), 3))
    assert value(strategies.facility_location(rows, relevance, 3).tolist()) >= (1 - 1 / np.e) * best


def test_mmr_is_its_definition() -> None:
    rows, relevance = problem()
    cosines = rows.astype(np.float64) @ rows.T.astype(np.float64)
    picked = [int(relevance.argmax())]
    while len(picked) < 20:
        left = [i for i in range(60) if i not in picked]
        picked.append(max(left, key=lambda i: 0.5 * relevance[i] - 0.5 * cosines[i, picked].max()))
    assert strategies.mmr(rows, relevance, 20).tolist() == picked


def test_k_means_takes_one_row_a_cluster() -> None:
    rng = np.random.default_rng()
    rows = np.repeat(np.eye(8), 20, axis=0) + rng.normal(size=(160, 8)) * 0.02
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    picked = strategies.k_means(rows, np.full(160, 0.5), 8, seed=0)
    assert len({int(i) // 20 for i in picked}) >= 6  # one start of k-means may merge two
    assert len(set(picked.tolist())) == 8


@pytest.mark.parametrize("name", ["top_k", "random", "mmr", "facility_location", "k_means"])
@pytest.mark.parametrize("budget", [1, 59, 60])
def test_every_strategy_picks_distinct_rows(name: str, budget: int) -> None:
    rows, relevance = problem()
    rows[30:] = rows[:30]
    seeded = {"seed": 0} if name in ("random", "k_means") else {}
    picked = getattr(strategies, name)(rows, relevance, budget, **seeded)
    assert picked.dtype == np.int64
    assert len(set(picked.tolist())) == budget
    with pytest.raises(SelectionError, match="budget is 61"):
        getattr(strategies, name)(rows, relevance, 61, **seeded)


def test_mmd_by_its_definition_and_zero_for_the_same_rows() -> None:
    picked, _ = problem(15)
    private, _ = problem(20)
    distances = [float(((a - b) ** 2).sum()) for a, b in combinations(private.astype(np.float64), 2)]
    width = np.median(distances)

    def mean_kernel(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
        return float(np.mean([np.exp(-((a - b) ** 2).sum() / (2 * width)) for a in one for b in other]))

    expected = mean_kernel(picked, picked) + mean_kernel(private, private) - 2 * mean_kernel(picked, private)
    assert squared_mmd(picked, private) == pytest.approx(expected, rel=1e-4)
    assert squared_mmd(private, private) == pytest.approx(0, abs=1e-12)


def test_coverage_is_the_mean_best_cosine() -> None:
    picked, _ = problem(15)
    private, _ = problem(20)
    assert coverage(picked, private) == pytest.approx(np.mean([max(p @ k for k in picked) for p in private]), abs=1e-6)
    assert coverage(private, private) == pytest.approx(1, abs=1e-6)
