"""From a pool's embeddings and a client's texts to that client's proxies."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.errors import SelectionError
from mergekit_moe.recipe import Selection
from mergekit_moe.selection.dpp import check_candidates, select_dpp
from mergekit_moe.selection.relevance import classifier_relevance

_MIN_SEPARATION = 0.6
_BLOCK = 65_536


class ProxySelection(NamedTuple):
    """A client's proxies and what was seen while picking them. Only `rows` ever leave the client."""

    rows: NDArray[np.int64]
    """(K,) distinct pool rows, in picking order."""
    relevance: NDArray[np.float64]
    """(N,) scores of all pool rows."""
    report: dict[str, Any]
    """What the client should see: separation, near-duplicates dropped, warnings."""


def dpp(pool_ND: NDArray[Any], relevance_N: NDArray[Any], settings: Selection, seed: int) -> NDArray[np.int64]:
    """Relevant and diverse: greedy MAP of the relevance-weighted DPP."""
    return select_dpp(pool_ND, relevance_N, settings.budget, alpha=settings.alpha, epsilon=settings.epsilon)


def top_k(pool_ND: NDArray[Any], relevance_N: NDArray[Any], settings: Selection, seed: int) -> NDArray[np.int64]:
    """The most relevant rows, whatever they repeat."""
    check_candidates(pool_ND, relevance_N, settings.budget)
    return np.argsort(-relevance_N, kind="stable")[: settings.budget].astype(np.int64)


def random(pool_ND: NDArray[Any], relevance_N: NDArray[Any], settings: Selection, seed: int) -> NDArray[np.int64]:
    """Any rows: the floor that a selector has to beat."""
    check_candidates(pool_ND, relevance_N, settings.budget)
    return np.random.default_rng(seed).permutation(len(relevance_N))[: settings.budget].astype(np.int64)


SELECTORS: dict[str, Callable[..., NDArray[np.int64]]] = {"dpp": dpp, "top-k": top_k, "random": random}


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
        copies_N: True for pool rows that are word for word a private text, sampled or not.

    Raises:
        SelectionError: if fewer rows can be picked than the budget asks for.
    """
    seed = int.from_bytes(hashlib.sha256(f"{name}-{seed}".encode()).digest()[:4])
    relevance = classifier_relevance(pool_ND, private_MD, seed=seed)
    too_close = _closest(pool_ND, private_MD) >= settings.duplicate_cosine
    if copies_N is not None:
        too_close |= copies_N
    candidates = np.flatnonzero(~too_close)
    if settings.candidates is not None:
        order = np.argsort(-relevance.scores[candidates], kind="stable")[: settings.candidates]
        candidates = np.sort(candidates[order])
    if settings.budget > len(candidates):
        raise SelectionError(
            f"expert '{name}': selection.budget is {settings.budget} but the pool has only {len(candidates)} rows to "
            f"pick from ({len(pool_ND)} in all, {int(too_close.sum())} too close to a private text); lower it"
        )
    picks = SELECTORS[settings.method](pool_ND[candidates], relevance.scores[candidates], settings, seed)
    report: dict[str, Any] = {
        "separation_auc": round(relevance.separation, 4),
        "near_duplicates_dropped": int(too_close.sum()),
        "candidates": len(candidates),
        "warnings": [],
    }
    if relevance.separation < _MIN_SEPARATION:
        report["warnings"].append(
            f"the classifier can hardly tell this client's texts from the pool (AUC {relevance.separation:.2f}); "
            "its proxies are little better than random ones"
        )
    return ProxySelection(candidates[picks], relevance.scores, report)


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
