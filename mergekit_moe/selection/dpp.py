"""Greedy MAP inference for a relevance-weighted k-DPP, exact over the whole pool, in feature space.

Source: Chen et al. 2018, Algorithm 1, on the kernel of MetaMoE (section 3.1),
L = Diag(q) (F F' + eps I) Diag(q) with q = r ** alpha. The N x N kernel is never formed: a pick takes one
product with D numbers a row. Nor are all rows looked at: gains only ever fall, so a gain that is out of date
is an upper bound (Minoux 1978), and what lies below the best up-to-date one may stay as it is.
Shapes: N candidates, K selected, D embedding size.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mergekit_moe.errors import SelectionError
from mergekit_moe.selection.device_gains import DeviceGains, check_on_device, is_on_device
from mergekit_moe.selection.gains import LazyGains, check_candidates
from mergekit_moe.selection.processes import ALONE, Processes

_NUGGET_PAST_RANK = 1e-4


class Picks(NamedTuple):
    """A selection, in picking order."""

    rows: NDArray[np.int64]
    """(K,) distinct row numbers."""
    gains: NDArray[np.float64]
    """(K,) log of the factor by which each pick multiplied det(L_S)."""


def select_dpp(
    embeddings: ArrayLike, relevance: ArrayLike, budget: int, *, alpha: float = 1.0, epsilon: float = 0.0
) -> NDArray[np.int64]:
    """Return `budget` distinct row numbers, int64, in the order they were picked.

    Args:
        embeddings: (N, D) unit rows, an array, memory map or tensor of any float type. All decisions are
            made in float64, from blocks of rows: beside the embeddings it takes about 50 bytes a row. A tensor
            on an accelerator is worked on there, all of its rows at each pick.
        relevance: (N,) scores in (0, 1].
        budget: how many rows to pick, 1 <= budget <= N; may exceed D.
        alpha: exponent on the relevance.
        epsilon: nugget on the similarity kernel. 0 is the published objective up to the rank of the
            embeddings; past it, where every further determinant is zero, picks go on with a nugget of 1e-4.

    Raises:
        SelectionError: if the budget is not in 1..N, a row is no finite unit vector, or a score lies
            outside (0, 1].
    """
    return greedy_map(embeddings, relevance, budget, alpha=alpha, epsilon=epsilon).rows


def greedy_map(
    embeddings: ArrayLike,
    relevance: ArrayLike,
    budget: int,
    *,
    alpha: float = 1.0,
    epsilon: float = 0.0,
    allowed: NDArray[np.bool_] | None = None,
    processes: Processes = ALONE,
) -> Picks:
    """`select_dpp` with the gain of each pick, for rows of which some may not be picked, on any number of processes.

    Args:
        allowed: (N,) False for rows that may not be picked; all may by default.
        processes: with several, `embeddings`, `relevance` and `allowed` are this process's share of the rows,
            and every process returns the picks of all, numbered over the shares joined.
    """
    on_device = is_on_device(embeddings)
    check = check_on_device if on_device else check_candidates
    features_ND: Any
    features_ND, scores_N, squares_N = check(embeddings, relevance)
    free_N = np.ones(len(scores_N), dtype=bool) if allowed is None else allowed
    sizes = processes.join(np.array([[len(scores_N), np.count_nonzero(free_N)]]))
    if not 1 <= budget <= sizes[:, 1].sum():
        raise SelectionError(f"budget is {budget}; it must lie between 1 and the {sizes[:, 1].sum()} candidates")
    first = int(sizes[: processes.rank, 0].sum())
    made: type[DeviceGains | LazyGains] = DeviceGains if on_device else LazyGains
    gains = made(features_ND, 2.0 * alpha * np.log(scores_N), squares_N, free_N, epsilon)
    nowhere = np.zeros(features_ND.shape[1])
    rows: list[int] = []
    values: list[float] = []
    features: list[NDArray[np.float64]] = []
    while len(rows) < budget:
        best = gains.best()
        own = (-np.inf, -1, nowhere) if best is None else (best[1], first + best[0], gains.feature(best[0]))
        gain, row, feature = processes.greatest(*own)
        if gain == -np.inf:  # the picks span every row that is left
            gains.start_nugget(_NUGGET_PAST_RANK, np.array(features))
            continue
        rows.append(row)
        values.append(gain)
        if epsilon == 0.0 and len(rows) <= len(feature):  # no more than D are picked before the nugget is needed
            features.append(feature)
        gains.take(feature, row - first if 0 <= row - first < len(scores_N) else None)
    return Picks(np.array(rows, dtype=np.int64), np.array(values))


def certificate_size(relevance: ArrayLike, picks: Picks, *, alpha: float = 1.0, epsilon: float = 0.0) -> int:
    """Return how many rows could have been picked at all: those with q^2 (1 + eps) >= the least gain picked.

    No selection within another set that holds these rows differs from one over the whole pool.
    """
    log_bound_N = 2.0 * alpha * np.log(np.asarray(relevance, dtype=np.float64)) + np.log1p(epsilon)
    return int(np.count_nonzero(log_bound_N >= picks.gains.min()))
