"""What each row would add to a DPP's determinant, given the picks so far.

Shapes: N candidates, K selected, D embedding size, C rows kept up to date, R rows brought up to date at once.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mergekit_moe.errors import SelectionError

EXHAUSTED = 1e-10
"""Squared residual of a unit row under which the span holds all that float64 can tell of it."""
_FRESH = 1024
"""Rows kept up to date, and rows brought up to date at a time: as float64 they fit a second-level cache."""
_BLOCK = 16_384
"""Rows converted to float64 at a time: the whole never is."""


def check_candidates(
    embeddings: ArrayLike, relevance: ArrayLike, budget: int | None = None
) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]]:
    """Return embeddings as they are, scores as float64, and the rows' squared lengths (N,), checked.

    Raises:
        SelectionError: see `select_dpp`.
    """
    features_ND = np.asarray(embeddings)
    squares_N = np.zeros(len(features_ND) if features_ND.ndim else 0)
    if features_ND.ndim == 2:
        for place, rows in in_blocks(features_ND):
            squares_N[place] = np.einsum("nd,nd->n", rows, rows)
    scores_N, squares_N = check_scores(relevance, features_ND.shape, squares_N)
    if budget is not None and not 1 <= budget <= len(scores_N):
        raise SelectionError(f"budget is {budget}; it must lie between 1 and the {len(scores_N)} candidates")
    return features_ND, scores_N, squares_N


def check_scores(
    relevance: ArrayLike, shape: tuple[int, ...], squares_N: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return scores as float64 and the rows' squared lengths (N,), checked against embeddings of that shape.

    Raises:
        SelectionError: see `select_dpp`.
    """
    scores_N = np.asarray(relevance, dtype=np.float64)
    if len(shape) != 2 or scores_N.shape != shape[:1]:
        raise SelectionError(f"embeddings have shape {shape} and relevance {scores_N.shape}; give (N, D) and (N,)")
    # Not `abs(norm - 1) > tolerance`: that is False for NaN.
    if bad := int(np.count_nonzero(~(np.abs(np.sqrt(squares_N) - 1.0) < 1e-2))):
        raise SelectionError(f"{bad} of {len(squares_N)} embeddings are no finite unit vectors; normalise them first")
    if bad := int(np.count_nonzero(~((scores_N > 0) & (scores_N <= 1)))):
        raise SelectionError(f"{bad} of {len(scores_N)} relevance scores lie outside (0, 1]")
    return scores_N, squares_N


def in_blocks(
    features_ND: NDArray[Any], rows: NDArray[np.int64] | None = None
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield (place, float64 rows) over all rows or over those given."""
    total = len(features_ND) if rows is None else len(rows)
    for first in range(0, total, _BLOCK):
        place = slice(first, min(first + _BLOCK, total))
        yield place, np.asarray(features_ND[place if rows is None else rows[place]], dtype=np.float64)


class Gains:
    """log gain_i = log q_i^2 + log v_i, of rows wherever they lie.

    v_i is what the picked rows leave unexplained of row i: v_i = f_i' A f_i (+ eps), A a D x D matrix.
    eps = 0: A is the projector off the picked rows, as in column-pivoted QR.
    eps > 0: v_i = eps (1 + f_i' A f_i) with A = (eps I + F_S' F_S)^-1. Both lose (f_i . u)^2 a pick.
    """

    def __init__(self, size: int, epsilon: float) -> None:
        self.epsilon = epsilon
        self.matrix: NDArray[np.float64] | None = None
        """(D, D), A: made when there are more picks than its size, and cheaper than all their directions."""
        self.count = 0
        self.directions = np.zeros((size, size))
        """The u of the last D picks, pick j in row j mod D."""

    def new_direction(self, feature: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return u (D,) of a picked row's feature, and keep it."""
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
        return direction

    def start_matrix(self, epsilon: float, picked_KD: NDArray[np.float64]) -> None:
        """Go on under a kernel with a nugget, with the picks so far accounted for in A."""
        self.matrix = np.linalg.inv(epsilon * np.eye(picked_KD.shape[1]) + picked_KD.T @ picked_KD).astype(np.float64)
        self.epsilon = epsilon
        self.count = 0

    def _explained_by_none(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return A times a vector."""
        if self.matrix is not None:
            return self.matrix @ vector
        directions = self.directions[: self.count]
        return (vector - directions.T @ (directions @ vector)) / (self.epsilon or 1.0)


class LazyGains(Gains):
    """Gains on the CPU, exact where it matters, an upper bound elsewhere."""

    def __init__(
        self,
        features_ND: NDArray[Any],
        log_quality_N: NDArray[np.float64],
        squares_N: NDArray[np.float64],
        free_N: NDArray[np.bool_],
        epsilon: float,
    ) -> None:
        super().__init__(features_ND.shape[1], epsilon)
        self.features = features_ND
        self.log_quality = log_quality_N
        self.free = free_N.copy()
        """(N,) False for rows that are taken, or may not be."""
        self.variance = np.where(free_N, squares_N + epsilon, 0.0)
        self.seen = np.zeros(len(log_quality_N), dtype=np.int32)
        """(N,) how many picks each row's variance has accounted for."""
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
        direction = self.new_direction(feature)
        share = self.fresh_features @ direction
        share *= share
        self.fresh_variance -= share
        if row is not None:
            self.free[row] = False
            self.fresh_variance[np.searchsorted(self.fresh, row)] = 0.0
        self.fresh_gain = self._log_gain(self.fresh_quality, self.fresh_variance)

    def start_nugget(self, epsilon: float, picked_KD: NDArray[np.float64]) -> None:
        """Go on past the rank: the same picks under a kernel with a nugget."""
        self.start_matrix(epsilon, picked_KD)
        self.variance = np.where(self.free, 1.03 + epsilon, 0.0)  # no unit row's can be greater
        self.seen[:] = -len(self.directions) - 1  # too long ago for the directions that are kept
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
        np.log(variance, out=gain, where=variance > (EXHAUSTED if self.epsilon == 0.0 else 0.0))
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
        for place, features in in_blocks(self.features, stale):
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
