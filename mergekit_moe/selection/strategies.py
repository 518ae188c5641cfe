"""Ways to pick K of N relevant rows, one function each, to be compared with the DPP.

Shapes: N candidates, K selected, D embedding size, M targets that are to be covered.
All take unit rows (N, D) and relevance (N,) in (0, 1] and return (K,) distinct int64 row numbers.
"""

import heapq

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.selection.gains import check_candidates

_TARGETS = 2048
"""How many of the most relevant rows facility location covers: the cost of a gain grows with them."""
_MMR_BALANCE = 0.5


def top_k(pool_ND: NDArray[np.floating], relevance_N: NDArray[np.float64], budget: int) -> NDArray[np.int64]:
    """The most relevant rows, whatever they repeat (FlexOlmo's way of finding proxy data)."""
    check_candidates(pool_ND, relevance_N, budget)
    return np.argsort(-relevance_N, kind="stable")[:budget].astype(np.int64)


def random(
    pool_ND: NDArray[np.floating], relevance_N: NDArray[np.float64], budget: int, *, seed: int
) -> NDArray[np.int64]:
    """Any rows: the floor that a selector has to beat."""
    check_candidates(pool_ND, relevance_N, budget)
    return np.random.default_rng(seed).permutation(len(relevance_N))[:budget].astype(np.int64)


def mmr(
    pool_ND: NDArray[np.floating], relevance_N: NDArray[np.float64], budget: int, *, balance: float = _MMR_BALANCE
) -> NDArray[np.int64]:
    """Maximal marginal relevance (Carbonell and Goldstein 1998).

    Each pick is the row with the greatest balance * relevance - (1 - balance) * its best cosine to a row picked.
    """
    features, relevance_N, _ = check_candidates(pool_ND, relevance_N, budget)
    score_N = balance * relevance_N
    closest_N = np.full(len(score_N), -np.inf)
    taken_N = np.zeros(len(score_N), dtype=bool)
    picked: list[int] = []
    while len(picked) < budget:
        gain_N = score_N - (1.0 - balance) * closest_N if picked else score_N.copy()
        gain_N[taken_N] = -np.inf
        picked.append(int(np.argmax(gain_N)))
        taken_N[picked[-1]] = True
        np.maximum(closest_N, features @ features[picked[-1]], out=closest_N)
    return np.array(picked, dtype=np.int64)


def facility_location(
    pool_ND: NDArray[np.floating], relevance_N: NDArray[np.float64], budget: int
) -> NDArray[np.int64]:
    """Greedy maximum of the sum over targets of relevance * best cosine to a row picked, lazily (Minoux 1978).

    Targets are the most relevant rows, at least 2,048 and at least the budget; only they are candidates.
    """
    features, relevance_N, _ = check_candidates(pool_ND, relevance_N, budget)
    rows = np.argsort(-relevance_N, kind="stable")[: max(_TARGETS, budget)]
    targets_MD = np.asarray(features[rows], dtype=np.float64)
    weights_M = np.asarray(relevance_N, dtype=np.float64)[rows]
    # Cosines from 0 on: a target that nothing covers yet counts nothing, and covering it never costs.
    similarity_MM = np.maximum(targets_MD @ targets_MD.T, 0.0)
    covered_M = np.zeros(len(rows))
    gains = [(-float(gain), i) for i, gain in enumerate(weights_M @ similarity_MM)]
    heapq.heapify(gains)
    picked: list[int] = []
    while len(picked) < budget:
        _, best = gains[0]
        gain = float(weights_M @ np.maximum(similarity_MM[:, best] - covered_M, 0.0))
        if len(gains) > 1 and -gain > min(gains[1:3])[0]:
            heapq.heapreplace(gains, (-gain, best))  # it was out of date: look again
            continue
        heapq.heappop(gains)
        picked.append(best)
        np.maximum(covered_M, similarity_MM[:, best], out=covered_M)
    return rows[picked].astype(np.int64)


def k_means(
    pool_ND: NDArray[np.floating], relevance_N: NDArray[np.float64], budget: int, *, seed: int
) -> NDArray[np.int64]:
    """The row nearest to each of K centres, over rows weighted by relevance; a centre's row is taken once.

    Clustered are the most relevant rows, twenty times the budget.
    """
    from sklearn.cluster import MiniBatchKMeans

    features, relevance_N, _ = check_candidates(pool_ND, relevance_N, budget)
    rows = np.argsort(-relevance_N, kind="stable")[: max(20 * budget, _TARGETS)]
    points = np.asarray(features[rows], dtype=np.float32)
    means = MiniBatchKMeans(budget, random_state=seed, n_init=1, batch_size=max(1024, 3 * budget))
    means.fit(points, sample_weight=relevance_N[rows])
    free = np.ones(len(rows), dtype=bool)
    picked: list[int] = []
    for centre in means.cluster_centers_:
        distance = np.where(free, ((points - centre) ** 2).sum(axis=1), np.inf)
        picked.append(int(np.argmin(distance)))
        free[picked[-1]] = False
    return rows[picked].astype(np.int64)
