"""Greedy MAP inference for a relevance-weighted k-DPP, in feature space.

Source: Chen et al. 2018, Algorithm 1, on the kernel of MetaMoE (section 3.1),
L = Diag(q) (F F' + eps I) Diag(q) with q = r ** alpha. The N x N kernel is never formed: one N x D
product a pick.
Shapes: N candidates, K selected, D embedding size.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mergekit_moe.errors import SelectionError

_EXHAUSTED = 1e-10
"""Squared residual of a unit row under which the span holds all that float64 can tell of it."""
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
        embeddings: (N, D) unit rows; worked on in float64.
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
    embeddings: ArrayLike, relevance: ArrayLike, budget: int, *, alpha: float = 1.0, epsilon: float = 0.0
) -> Picks:
    """`select_dpp` with the gain of each pick."""
    features_ND, scores_N = check_candidates(embeddings, relevance, budget)
    log_quality_N = 2.0 * alpha * np.log(scores_N)
    residual = _Residual(features_ND, epsilon)
    taken_N = np.zeros(len(scores_N), dtype=bool)
    rows: list[int] = []
    gains: list[float] = []
    for _ in range(budget):
        if residual.exhausted(taken_N):
            residual = _Residual(features_ND, _NUGGET_PAST_RANK, already=rows)
        log_gain_N = log_quality_N + residual.log_variance()
        log_gain_N[taken_N] = -np.inf
        row = int(np.argmax(log_gain_N))
        rows.append(row)
        gains.append(float(log_gain_N[row]))
        taken_N[row] = True
        residual.condition_on(row)
    return Picks(np.array(rows, dtype=np.int64), np.array(gains))


def check_candidates(
    embeddings: ArrayLike, relevance: ArrayLike, budget: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return embeddings and scores as float64, checked.

    Raises:
        SelectionError: see `select_dpp`.
    """
    features_ND = np.asarray(embeddings, dtype=np.float64)
    scores_N = np.asarray(relevance, dtype=np.float64)
    if features_ND.ndim != 2 or scores_N.shape != features_ND.shape[:1]:
        raise SelectionError(
            f"embeddings have shape {features_ND.shape} and relevance {scores_N.shape}; give (N, D) and (N,)"
        )
    if not 1 <= budget <= len(scores_N):
        raise SelectionError(f"budget is {budget}; it must lie between 1 and the {len(scores_N)} candidates")
    norms_N = np.linalg.norm(features_ND, axis=1)
    # Not `abs(norm - 1) > tolerance`: that is False for NaN.
    if bad := int(np.count_nonzero(~(np.abs(norms_N - 1.0) < 1e-2))):
        raise SelectionError(f"{bad} of {len(norms_N)} embeddings are no finite unit vectors; normalise them first")
    if bad := int(np.count_nonzero(~((scores_N > 0) & (scores_N <= 1)))):
        raise SelectionError(f"{bad} of {len(scores_N)} relevance scores lie outside (0, 1]")
    return features_ND, scores_N


class _Residual:
    """What the picked rows leave unexplained of every row: v_i = f_i' A f_i (+ eps), A a D x D matrix.

    eps = 0: A is the projector off the picked rows, as in column-pivoted QR.
    eps > 0: v_i = eps (1 + f_i' M^-1 f_i) with M = eps I + F_S' F_S. Both lose (f_i . u)^2 a pick.
    """

    def __init__(self, features_ND: NDArray[np.float64], epsilon: float, already: list[int] | None = None) -> None:
        self.matrix: NDArray[np.float64]
        self.features = features_ND
        self.epsilon = epsilon
        size = features_ND.shape[1]
        if epsilon == 0.0:
            self.matrix = np.eye(size)
            self.variance = np.einsum("nd,nd->n", features_ND, features_ND)
            return
        picked = features_ND[already or []]
        self.matrix = np.linalg.inv(epsilon * np.eye(size) + picked.T @ picked).astype(np.float64)
        self.variance = epsilon * (1.0 + np.einsum("nd,nd->n", features_ND @ self.matrix, features_ND))

    def log_variance(self) -> NDArray[np.float64]:
        with np.errstate(divide="ignore"):
            return np.log(np.maximum(self.variance, 0.0))

    def exhausted(self, taken_N: NDArray[np.bool_]) -> bool:
        return self.epsilon == 0.0 and not np.any(self.variance[~taken_N] > _EXHAUSTED)

    def condition_on(self, row: int) -> None:
        feature = self.features[row]
        direction = self.matrix @ feature
        if self.epsilon == 0.0:
            direction = self.matrix @ direction  # projected twice: one pass loses digits near the rank
            direction /= np.linalg.norm(direction)
            self.matrix -= np.outer(direction, direction)
        else:
            direction *= np.sqrt(self.epsilon / (1.0 + feature @ direction))
            self.matrix -= np.outer(direction, direction) / self.epsilon
        self.variance -= (self.features @ direction) ** 2
