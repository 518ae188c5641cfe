"""From a pool's embeddings and a client's texts to that client's proxies."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.errors import SelectionError
from mergekit_moe.recipe import Selection
from mergekit_moe.selection import strategies
from mergekit_moe.selection.dpp import select_dpp
from mergekit_moe.selection.quality import coverage, squared_mmd
from mergekit_moe.selection.relevance import RELEVANCE

_MIN_SEPARATION = 0.6
_FEW_PRIVATE = 200
"""Private texts under which relevance may tell too much of a single one."""
_ALPHAS = (1.0, 2.0, 4.0, 8.0)
_MIN_JUDGES = 10
_BLOCK = 65_536


class ProxySelection(NamedTuple):
    """A client's proxies and what was seen while picking them. Only `rows` ever leave the client."""

    rows: NDArray[np.int64]
    """(K,) distinct pool rows, in picking order."""
    relevance: NDArray[np.float64]
    """(N,) scores of all pool rows."""
    report: dict[str, Any]
    """What the client should see: separation, near-duplicates dropped, warnings."""


def _dpp(pool_ND: NDArray[Any], relevance_N: NDArray[Any], settings: Selection, seed: int) -> NDArray[np.int64]:
    assert settings.alpha != "auto"
    return select_dpp(pool_ND, relevance_N, settings.budget, alpha=settings.alpha, epsilon=settings.epsilon)


SELECTORS: dict[str, Callable[[NDArray[Any], NDArray[Any], Selection, int], NDArray[np.int64]]] = {
    "dpp": _dpp,
    "top-k": lambda pool, relevance, settings, seed: strategies.top_k(pool, relevance, settings.budget),
    "random": lambda pool, relevance, settings, seed: strategies.random(pool, relevance, settings.budget, seed=seed),
    "mmr": lambda pool, relevance, settings, seed: strategies.mmr(pool, relevance, settings.budget),
    "facility-location": lambda pool, relevance, settings, seed: strategies.facility_location(
        pool, relevance, settings.budget
    ),
    "k-means": lambda pool, relevance, settings, seed: strategies.k_means(pool, relevance, settings.budget, seed=seed),
}


def select_proxies(
    pool_ND: NDArray[np.float32],
    private_MD: NDArray[np.float32],
    settings: Selection,
    *,
    name: str,
    seed: int,
    copies_N: NDArray[np.bool_] | None = None,
) -> ProxySelection:
    """Return the proxies of one client.

    Args:
        pool_ND: unit embeddings of the pool's N rows.
        private_MD: unit embeddings of M of the client's texts; nothing computed from them but the row
            numbers is meant to leave the client.
        name: the expert's name, for errors; it also sets this client's draws apart from the others'.
        copies_N: True for pool rows that are word for word a private text, sampled or not; dropped with the
            near-duplicates, where these are.

    Raises:
        SelectionError: if fewer rows can be picked than the budget asks for.
    """
    seed = int.from_bytes(hashlib.sha256(f"{name}-{seed}".encode()).digest()[:4])
    too_close = np.zeros(len(pool_ND), dtype=bool)
    if settings.duplicate_cosine is not None:
        too_close = _closest(pool_ND, private_MD) >= settings.duplicate_cosine
        if copies_N is not None:
            too_close |= copies_N
    left = int(len(pool_ND) - too_close.sum())
    if settings.budget > min(left, settings.candidates or left):
        raise SelectionError(
            f"expert '{name}': selection.budget is {settings.budget} but the pool has only "
            f"{min(left, settings.candidates or left)} rows to pick from ({len(pool_ND)} in all, "
            f"{int(too_close.sum())} too close to a private text); lower it"
        )
    sweep: list[dict[str, float]] = []
    if settings.method == "dpp" and settings.alpha == "auto":
        sweep = _judge_alphas(pool_ND, private_MD, ~too_close, settings, name=name, seed=seed)
        settings = settings.model_copy(update={"alpha": sweep[0]["alpha"]})
    relevance = RELEVANCE[settings.relevance](pool_ND, private_MD, seed=seed)
    candidates = _candidates(relevance.scores, ~too_close, settings)
    picks = SELECTORS[settings.method](pool_ND[candidates], relevance.scores[candidates], settings, seed)
    report: dict[str, Any] = {
        "separation_auc": round(relevance.separation, 4),
        "near_duplicates_dropped": int(too_close.sum()),
        "candidates": len(candidates),
        "warnings": [],
    }
    if sweep:
        report["alpha"] = settings.alpha
        report["alphas"] = sweep
    if len(private_MD) < _FEW_PRIVATE:
        report["warnings"].append(
            f"only {len(private_MD)} private texts were embedded: the choice of proxies may tell more of single ones "
            f"than it would with {_FEW_PRIVATE} or more"
        )
    if relevance.separation < _MIN_SEPARATION:
        report["warnings"].append(
            f"the classifier can hardly tell this client's texts from the pool (AUC {relevance.separation:.2f}); "
            "its proxies are little better than random ones"
        )
    return ProxySelection(candidates[picks], relevance.scores, report)


def _candidates(scores_N: NDArray[np.float64], allowed_N: NDArray[np.bool_], settings: Selection) -> NDArray[np.int64]:
    """Return the rows that may be picked, ascending: the whole pool, or its most relevant rows as published."""
    candidates = np.flatnonzero(allowed_N)
    if settings.candidates is None:
        return candidates
    order = np.argsort(-scores_N[candidates], kind="stable")[: settings.candidates]
    return np.sort(candidates[order])


def _judge_alphas(
    pool_ND: NDArray[np.float32],
    private_MD: NDArray[np.float32],
    allowed_N: NDArray[np.bool_],
    settings: Selection,
    *,
    name: str,
    seed: int,
) -> list[dict[str, float]]:
    """Return what each alpha does to private texts that its relevance never saw, the best one first.

    Best is the least sum of ranks by discrepancy and by coverage, the smaller discrepancy where those are equal.
    """
    order = np.random.default_rng(seed).permutation(len(private_MD))
    judges, known = order[: len(order) // 3], order[len(order) // 3 :]
    if len(judges) < _MIN_JUDGES:
        raise SelectionError(
            f"expert '{name}': selection.alpha 'auto' judges by a third of the private texts, and {len(judges)} "
            f"are too few; give a number, or at least {3 * _MIN_JUDGES} texts"
        )
    scores = RELEVANCE[settings.relevance](pool_ND, private_MD[known], seed=seed).scores
    candidates = _candidates(scores, allowed_N, settings)
    sweep = []
    for alpha in _ALPHAS:
        tried = settings.model_copy(update={"alpha": alpha})
        picked = pool_ND[candidates[_dpp(pool_ND[candidates], scores[candidates], tried, seed)]]
        mmd, covered = squared_mmd(picked, private_MD[judges]), coverage(picked, private_MD[judges])
        sweep.append({"alpha": alpha, "squared_mmd": round(mmd, 6), "coverage": round(covered, 4)})

    def rank(row: dict[str, float]) -> tuple[int, float]:
        nearer = sum(other["squared_mmd"] < row["squared_mmd"] for other in sweep)
        wider = sum(other["coverage"] > row["coverage"] for other in sweep)
        return nearer + wider, row["squared_mmd"]

    return sorted(sweep, key=rank)


def _closest(pool_ND: NDArray[np.float32], private_MD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return each pool row's greatest cosine to a private text, (N,), a block of rows at a time."""
    blocks = [pool_ND[start : start + _BLOCK] for start in range(0, len(pool_ND), _BLOCK)]
    return np.concatenate([(block @ private_MD.T).max(axis=1) for block in blocks])


def tag_shares(
    chosen: NDArray[np.int64],
    tags: list[str],
    tag: str,
    relevance_N: NDArray[np.float64],
    pool_ND: NDArray[np.float32],
    settings: Selection,
    seed: int,
) -> dict[str, float]:
    """Return the share of picks that carry the client's true tag: as selected, by top-k and at random."""
    right = np.array([t == tag for t in tags])
    picked = {"selected": chosen}
    for other in ("top-k", "random"):
        picked[other] = SELECTORS[other](pool_ND, relevance_N, settings, seed)
    return {method: float(right[rows].mean()) for method, rows in picked.items()}
