"""Greedy MAP: exact, distinct at any budget, and loud about bad input."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import qr

from mergekit_moe.errors import SelectionError
from mergekit_moe.selection import device_gains, dpp, gains, select_dpp
from mergekit_moe.selection.dpp import certificate_size, greedy_map


def unit_rows(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float64]:
    rows = rng.normal(size=(n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def brute_force(kernel: NDArray[np.float64], budget: int) -> list[int]:
    """Greedy MAP by determinants alone, float64: no shared code, no shared formula."""
    picked: list[int] = []
    for _ in range(budget):
        left = [i for i in range(len(kernel)) if i not in picked]
        gain = [np.linalg.slogdet(kernel[np.ix_([*picked, i], [*picked, i])])[1] for i in left]
        picked.append(left[int(np.argmax(gain))])
    return picked


def dense_greedy(kernel: NDArray[np.float64], budget: int, picked: list[int], spanned: float) -> list[int]:
    """Chen et al. 2018, Algorithm 1, on the whole kernel; goes on from `picked`, ends where nothing adds anything."""
    chosen, rows = [], np.zeros((budget, len(kernel)))
    gain = kernel.diagonal().copy()
    quality = gain.copy()
    while len(chosen) < budget:
        last = picked[len(chosen)] if len(chosen) < len(picked) else int(gain.argmax())
        if len(chosen) >= len(picked) and gain[last] <= spanned * quality[last]:
            break
        k = len(chosen)
        rows[k] = (kernel[last] - rows[:k, last] @ rows[:k]) / np.sqrt(gain[last])
        gain -= rows[k] ** 2
        gain[last] = -np.inf
        chosen.append(last)
    return chosen


def random_seed() -> int:
    """Fresh every run; printed by the assertion when a problem fails."""
    return int(np.random.default_rng().integers(2**31))


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.1])
def test_greedy_equals_brute_force_on_fresh_random_kernels(epsilon: float) -> None:
    for seed in (random_seed() for _ in range(25)):
        rng = np.random.default_rng(seed)
        n, d = int(rng.integers(4, 70)), int(rng.integers(2, 25))
        features, relevance, alpha = unit_rows(rng, n, d), rng.uniform(0.05, 1, n), float(rng.uniform(0.5, 3))
        budget = int(rng.integers(1, min(n, d if epsilon == 0 else n) + 1))
        quality = relevance**alpha
        kernel = quality[:, None] * (features @ features.T + epsilon * np.eye(n)) * quality
        picked = select_dpp(features, relevance, budget, alpha=alpha, epsilon=epsilon)
        assert picked.tolist() == brute_force(kernel, budget), f"seed {seed}"


@pytest.mark.parametrize("fresh", [16, 1024])
def test_lazy_equals_dense_on_fresh_random_problems(fresh: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any budget to N, past the rank too, clustered rows, flat and steep relevance, rows stored as float32."""
    monkeypatch.setattr(gains, "_FRESH", fresh)
    for seed in (random_seed() for _ in range(100)):
        rng = np.random.default_rng(seed)
        n, d = int(2 ** rng.uniform(2, 11)), int(rng.integers(2, 65))
        centres = rng.normal(size=(8, d))
        rows = centres[rng.integers(0, 8, n)] * rng.uniform(0, 2) + rng.normal(size=(n, d))
        features = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        relevance, alpha = rng.uniform(0.02, 1, n) ** rng.choice([0.01, 1.0, 3.0]), float(rng.uniform(0.5, 2))
        epsilon, budget = float(rng.choice([0.0, 1e-3, 0.1])), int(rng.integers(1, n + 1))
        quality, exact = relevance**alpha, features.astype(np.float64)
        similarity = exact @ exact.T

        def kernel(nugget: float, similarity=similarity, quality=quality, n=n) -> NDArray[np.float64]:
            return quality[:, None] * (similarity + nugget * np.eye(n)) * quality

        expected = dense_greedy(kernel(epsilon), budget, [], 1e-9 if epsilon == 0 else 0.0)
        if len(expected) < budget:
            expected = dense_greedy(kernel(1e-4), budget, expected, 0.0)
        picked = select_dpp(features, relevance, budget, alpha=alpha, epsilon=epsilon)
        assert picked.tolist() == expected, f"seed {seed}"


def test_a_memory_map_is_never_copied_whole(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(random_seed())
    features, relevance = unit_rows(rng, 500, 12).astype(np.float16), rng.uniform(0.1, 1, 500)
    np.save(f"{tmp_path}/rows.npy", features)
    monkeypatch.setattr(gains, "_BLOCK", 64)
    monkeypatch.setattr(gains, "_FRESH", 32)
    stored = np.load(f"{tmp_path}/rows.npy", mmap_mode="r")
    assert select_dpp(stored, relevance, 200).tolist() == select_dpp(features, relevance, 200).tolist()


def test_the_certificate_holds_every_row_that_matters() -> None:
    """Selection among the rows that it counts alone gives the same picks."""
    rng = np.random.default_rng(random_seed())
    features, relevance = unit_rows(rng, 400, 12), rng.beta(0.5, 3, 400).clip(1e-6, 1)
    picks = greedy_map(features, relevance, 30, epsilon=0.1)
    inside = np.argsort(-relevance)[: certificate_size(relevance, picks, epsilon=0.1)]
    assert len(inside) < 400
    again = select_dpp(features[inside], relevance[inside], 30, epsilon=0.1)
    assert inside[again].tolist() == picks.rows.tolist()


def test_greedy_equals_column_pivoted_qr_up_to_the_rank() -> None:
    seed = random_seed()
    rng = np.random.default_rng(seed)
    features, relevance = unit_rows(rng, 300, 40), rng.uniform(0.1, 1, 300)
    _, _, pivots = qr((relevance[:, None] * features).T, mode="economic", pivoting=True)
    assert select_dpp(features, relevance, 40).tolist() == pivots[:40].tolist(), f"seed {seed}"


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("budget", [1, 7, 8, 9, 100, 200])
def test_no_item_is_ever_picked_twice(budget: int, epsilon: float) -> None:
    """Rank 8, 200 rows, half of them exact copies: the authors' code repeats itself here."""
    rng = np.random.default_rng(budget)
    half = unit_rows(rng, 100, 8)
    picked = select_dpp(np.concatenate([half, half]), rng.uniform(0.1, 1, 200), budget, epsilon=epsilon)
    assert picked.dtype == np.int64
    assert len(set(picked.tolist())) == budget


def test_gains_add_up_to_the_log_determinant_and_never_rise() -> None:
    rng = np.random.default_rng(random_seed())
    features, relevance = unit_rows(rng, 60, 12), rng.uniform(0.2, 1, 60)
    picks = greedy_map(features, relevance, 40, epsilon=0.1)
    kernel = relevance[:, None] * (features @ features.T + 0.1 * np.eye(60)) * relevance
    expected = np.linalg.slogdet(kernel[np.ix_(picks.rows, picks.rows)])[1]
    assert picks.gains.sum() == pytest.approx(expected, abs=1e-8)
    assert np.all(np.diff(picks.gains) <= 1e-9)


def test_a_large_nugget_is_top_k() -> None:
    rng = np.random.default_rng(0)
    features, relevance = unit_rows(rng, 80, 10), rng.uniform(0.1, 1, 80)
    picked = select_dpp(features, relevance, 20, epsilon=1e9)
    assert picked.tolist() == np.argsort(-relevance)[:20].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"budget": 11}, "between 1 and the 10 candidates"),
        ({"nan": True}, "1 of 10 embeddings are no finite unit vectors"),
        ({"zero": True}, "1 of 10 embeddings are no finite unit vectors"),
        ({"relevance": 0.0}, "1 of 10 relevance scores lie outside"),
        ({"relevance": 1.5}, "1 of 10 relevance scores lie outside"),
        ({"relevance": float("nan")}, "1 of 10 relevance scores lie outside"),
        ({"short": True}, "give (N, D) and (N,)"),
    ],
)
def test_bad_input_is_named(change: dict[str, float], message: str) -> None:
    features, relevance = unit_rows(np.random.default_rng(0), 10, 4), np.full(10, 0.5)
    if "nan" in change:
        features[3, 1] = np.nan
    if "zero" in change:
        features[3] = 0
    if "relevance" in change:
        relevance[2] = change["relevance"]
    if "short" in change:
        relevance = relevance[:9]
    with pytest.raises(SelectionError) as error:
        select_dpp(features, relevance, int(change.get("budget", 3)))
    assert message in str(error.value)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_an_accelerators_tensor_gives_the_same_picks(epsilon: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for accelerators, run on the CPU: any budget, past the rank, rows that may not be picked."""
    monkeypatch.setattr(device_gains, "_BLOCK", 50)
    for _ in range(10):
        rng = np.random.default_rng(random_seed())
        n, size = int(rng.integers(5, 300)), int(rng.integers(2, 30))
        features, relevance = unit_rows(rng, n, size), rng.uniform(0.01, 1, n)
        allowed = rng.uniform(size=n) < 0.9
        budget = int(rng.integers(1, allowed.sum() + 1))
        settings = {"alpha": 2.0, "epsilon": epsilon, "allowed": allowed}
        here = greedy_map(features, relevance, budget, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(dpp, "is_on_device", lambda embeddings: True)
            there = greedy_map(torch.from_numpy(features), relevance, budget, **settings)
            with pytest.raises(SelectionError, match="1 of"):
                greedy_map(torch.from_numpy(features * np.append(np.ones(n - 1), np.nan)[:, None]), relevance, 1)
        assert here.rows.tolist() == there.rows.tolist()
        assert np.allclose(here.gains, there.gains)
