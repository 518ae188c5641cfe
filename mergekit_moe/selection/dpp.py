"""Greedy MAP inference for a relevance-weighted k-DPP, exact over the whole pool, in feature space.

Source: Chen et al. 2018, Algorithm 1, on the kernel of MetaMoE (section 3.1),
L = Diag(q) (F F' + eps I) Diag(q) with q = r ** alpha. The N x N kernel is never formed: a pick takes one
product with D numbers a row. Nor are all rows looked at: gains only ever fall, so a gain that is out of date
is an upper bound (Minoux 1978), and what lies below the best up-to-date one may stay as it is.
Shapes: N candidates, K selected, D embedding size, C rows kept up to date, R rows brought up to date at once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mergekit_moe.errors import SelectionError
from mergekit_moe.selection.processes import ALONE, Processes

_EXHAUSTED = 1e-10
"""Squared residual of a unit row under which the span holds all that float64 can tell of it."""
_NUGGET_PAST_RANK = 1e-4
_FRESH = 1024
"""Rows kept up to date, and rows brought up to date at a time: as float64 they fit a second-level cache."""
_BLOCK = 16_384
"""Rows converted to float64 at a time: the whole never is."""


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
        embeddings: (N, D) unit rows, an array, memory map or CPU tensor of any float type. All decisions are
            made in float64, from blocks of rows: beside the embeddings it takes about 50 bytes a row.
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
    features_ND, scores_N, squares_N = check_candidates(embeddings, relevance)
    free_N = np.ones(len(scores_N), dtype=bool) if allowed is None else allowed
    sizes = processes.join(np.array([[len(scores_N), np.count_nonzero(free_N)]]))
    if not 1 <= budget <= sizes[:, 1].sum():
        raise SelectionError(f"budget is {budget}; it must lie between 1 and the {sizes[:, 1].sum()} candidates")
    first = int(sizes[: processes.rank, 0].sum())
    gains = _LazyGains(features_ND, 2.0 * alpha * np.log(scores_N), squares_N, free_N, epsilon)
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


def check_candidates(
    embeddings: ArrayLike, relevance: ArrayLike, budget: int | None = None
) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]]:
    """Return embeddings as they are, scores as float64, and the rows' squared lengths (N,), checked.

    Raises:
        SelectionError: see `select_dpp`.
    """
    features_ND = np.asarray(embeddings)
    scores_N = np.asarray(relevance, dtype=np.float64)
    if features_ND.ndim != 2 or scores_N.shape != features_ND.shape[:1]:
        raise SelectionError(
            f"embeddings have shape {features_ND.shape} and relevance {scores_N.shape}; give (N, D) and (N,)"
        )
    if budget is not None and not 1 <= budget <= len(scores_N):
        raise SelectionError(f"budget is {budget}; it must lie between 1 and the {len(scores_N)} candidates")
    squares_N = np.zeros(len(features_ND))
    for place, rows in _in_blocks(features_ND):
        squares_N[place] = np.einsum("nd,nd->n", rows, rows)
    # Not `abs(norm - 1) > tolerance`: that is False for NaN.
    if bad := int(np.count_nonzero(~(np.abs(np.sqrt(squares_N) - 1.0) < 1e-2))):
        raise SelectionError(f"{bad} of {len(squares_N)} embeddings are no finite unit vectors; normalise them first")
    if bad := int(np.count_nonzero(~((scores_N > 0) & (scores_N <= 1)))):
        raise SelectionError(f"{bad} of {len(scores_N)} relevance scores lie outside (0, 1]")
    return features_ND, scores_N, squares_N


def _in_blocks(
    features_ND: NDArray[Any], rows: NDArray[np.int64] | None = None
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield (place, float64 rows) over all rows or over those given."""
    total = len(features_ND) if rows is None else len(rows)
    for first in range(0, total, _BLOCK):
        place = slice(first, min(first + _BLOCK, total))
        yield place, np.asarray(features_ND[place if rows is None else rows[place]], dtype=np.float64)


class _LazyGains:
    """log gain_i = log q_i^2 + log v_i, exact where it matters, an upper bound elsewhere.

    v_i is what the picked rows leave unexplained of row i: v_i = f_i' A f_i (+ eps), A a D x D matrix.
    eps = 0: A is the projector off the picked rows, as in column-pivoted QR.
    eps > 0: v_i = eps (1 + f_i' A f_i) with A = (eps I + F_S' F_S)^-1. Both lose (f_i . u)^2 a pick.
    """

    def __init__(
        self,
        features_ND: NDArray[Any],
        log_quality_N: NDArray[np.float64],
        squares_N: NDArray[np.float64],
        free_N: NDArray[np.bool_],
        epsilon: float,
    ) -> None:
        size = features_ND.shape[1]
        self.features = features_ND
        self.log_quality = log_quality_N
        self.epsilon = epsilon
        self.matrix: NDArray[np.float64] | None = None
        """(D, D), A: made when there are more picks than its size, and cheaper than all their directions."""
        self.free = free_N.copy()
        """(N,) False for rows that are taken, or may not be."""
        self.variance = np.where(free_N, squares_N + epsilon, 0.0)
        self.count = 0
        self.seen = np.zeros(len(log_quality_N), dtype=np.int32)
        """(N,) how many picks each row's variance has accounted for."""
        self.directions = np.zeros((size, size))
        """The u of the last D picks, pick j in row j mod D."""
        self._restart()

    def best(self) -> tuple[int, float] | None:
        """Return the row of greatest gain and that gain; None if no row that is left adds to the span."""
        wanted = _FRESH
        while True:
            place = int(np.argmax(self.fresh_gain)) if len(self.fresh) else -1
            gain = self.fresh_gain[place] if place >= 0 else -np.inf
            if gain >= self.outside:
                return None if gain == -np.inf else (int(self.fresh[place]), float(gain))
            self._bring_up_to_date(wanted)
            wanted *= 2  # where gains lie close together, all rows have to be looked at: do it in few steps

    def feature(self, row: int) -> NDArray[np.float64]:
        return np.asarray(self.features[row], dtype=np.float64)

    def take(self, feature: NDArray[np.float64], row: int | None) -> None:
        """Condition on a picked row's feature (D,); `row` is its number if it is one of these."""
        direction = self._explained_by_none(feature)
        if self.epsilon == 0.0:
            direction = self._explained_by_none(direction)  # projected twice: one pass loses digits near the rank
            direction /= np.linalg.norm(direction)
        else:
            direction *= np.sqrt(self.epsilon / (1.0 + feature @ direction))
        size = len(self.directions)
        self.directions[self.count % size] = direction
        self.count += 1
        if self.matrix is not None:
            self.matrix -= np.outer(direction, direction / self.epsilon)
        elif self.count == size and self.epsilon > 0.0:
            self.matrix = (np.eye(size) - self.directions.T @ self.directions) / self.epsilon
        share = self.fresh_features @ direction
        share *= share
        self.fresh_variance -= share
        if row is not None:
            self.free[row] = False
            self.fresh_variance[np.searchsorted(self.fresh, row)] = 0.0
        self.fresh_gain = self._log_gain(self.fresh_quality, self.fresh_variance)

    def _explained_by_none(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return A times a vector."""
        if self.matrix is not None:
            return self.matrix @ vector
        directions = self.directions[: self.count]
        return (vector - directions.T @ (directions @ vector)) / (self.epsilon or 1.0)

    def start_nugget(self, epsilon: float, picked_KD: NDArray[np.float64]) -> None:
        """Go on past the rank: the same picks under a kernel with a nugget."""
        self.matrix = np.linalg.inv(epsilon * np.eye(picked_KD.shape[1]) + picked_KD.T @ picked_KD).astype(np.float64)
        self.epsilon = epsilon
        self.variance = np.where(self.free, 1.03 + epsilon, 0.0)  # no unit row's can be greater
        self.seen[:] = -len(self.directions) - 1  # too long ago for the directions that are kept
        self.count = 0
        self._restart()

    def _restart(self) -> None:
        self.fresh = np.zeros(0, dtype=np.int64)
        self.fresh_features = np.zeros((0, self.features.shape[1]))
        self.fresh_variance: NDArray[np.float64] = np.zeros(0)
        self.fresh_gain = np.zeros(0)
        self.fresh_quality: NDArray[np.float64] = np.zeros(0)
        self.bound = self._log_gain(self.log_quality, self.variance)
        """(N,) upper bounds of the gains; -inf for rows that are fresh, and so have exact ones, or taken."""
        self.outside = float(self.bound.max(initial=-np.inf))

    def _log_gain(self, log_quality: NDArray[np.float64], variance: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (R,) log gains; -inf for rows that are taken (variance 0) or that the picks span."""
        gain = np.full(len(variance), -np.inf)
        np.log(variance, out=gain, where=variance > (_EXHAUSTED if self.epsilon == 0.0 else 0.0))
        gain += log_quality
        return gain

    def _bring_up_to_date(self, wanted: int) -> None:
        """Make exact the `wanted` rows of the highest bounds, then keep the best of them and of the fresh ones."""
        self.variance[self.fresh] = self.fresh_variance
        self.seen[self.fresh] = self.count
        self.bound[self.fresh] = self.fresh_gain
        wanted = min(wanted, len(self.bound))
        rows = np.argpartition(self.bound, len(self.bound) - wanted)[-wanted:]
        rows = np.sort(rows[self.bound[rows] > -np.inf])
        stale = rows[self.seen[rows] < self.count]
        for place, features in _in_blocks(self.features, stale):
            self._make_exact(stale[place], features)
        self.bound[stale] = self._log_gain(self.log_quality[stale], self.variance[stale])
        if len(rows) > _FRESH:
            rows = np.sort(rows[np.argpartition(self.bound[rows], len(rows) - _FRESH)[-_FRESH:]])
        self.fresh = rows
        self.fresh_features = np.asarray(self.features[rows], dtype=np.float64)
        self.fresh_quality = self.log_quality[rows]
        self.fresh_variance = self.variance[rows]
        self.fresh_gain = self.bound[rows]
        self.bound[rows] = -np.inf
        self.outside = float(self.bound.max(initial=-np.inf))

    def _make_exact(self, rows: NDArray[np.int64], features: NDArray[np.float64]) -> None:
        """Account for the picks that rows have missed: one direction at a time, or from scratch if those are many."""
        missed = self.count - self.seen[rows]
        long_ago = missed > len(self.directions)
        if long_ago.any():
            old = features[long_ago]
            assert self.matrix is not None  # there were more picks than directions are kept
            self.variance[rows[long_ago]] = self.epsilon * (1.0 + np.einsum("rd,rd->r", old @ self.matrix, old))
        recent = ~long_ago
        if recent.any():
            most = int(missed[recent].max())
            last = np.arange(self.count - most, self.count)
            shares = (features[recent] @ self.directions[last % len(self.directions)].T) ** 2
            shares[last[None, :] < self.seen[rows[recent], None]] = 0.0
            self.variance[rows[recent]] -= shares.sum(axis=1)
        self.seen[rows] = self.count
