"""How relevant each public row is to a client: one function a kind of evidence."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.errors import SelectionError

_MAX_NEGATIVES = 20_000
_FOLDS = 5
_SMALLEST = 1e-6
_COPY = 0.9
"""Cosine to a private text above which a pool row counts as a copy of it."""
_BLOCK = 65_536
_FEW = 100
"""Private texts under which a logistic regression remembers single ones, and a shrunk LDA stands in for it."""


class Relevance(NamedTuple):
    """Scores of the pool's rows for one client."""

    scores: NDArray[np.float64]
    """(N,) in (0, 1]: estimated P(row is the client's | row), at equal priors."""
    separation: float
    """Area under the ROC curve, client's texts against pool, out of fold: 0.5 is 'can't tell them apart'."""


def classifier_relevance(pool_ND: NDArray[np.float32], private_MD: NDArray[np.float32], *, seed: int) -> Relevance:
    """Score the pool by a balanced logistic regression, client's texts against pool (MetaMoE, section 3.1).

    Every score is out of fold on both sides: no row is scored by a classifier that saw it as a negative, nor by
    one that saw a private text that it copies. So a copy of a private text scores as a new text of the domain
    would, and being picked says little about membership. Below 100 private texts the classifier is linear
    discriminant analysis with a shrunk covariance (Ledoit and Wolf 2004).

    Args:
        pool_ND: unit embeddings of the pool; up to 20,000 of them serve as negatives.
        private_MD: unit embeddings of the client's texts.

    Raises:
        SelectionError: if there are too few rows on either side to hold any out.
    """
    from sklearn.metrics import roc_auc_score

    if len(private_MD) < 2 * _FOLDS or len(pool_ND) < 2 * _FOLDS:
        raise SelectionError(
            f"a relevance classifier needs at least {2 * _FOLDS} rows on both sides, "
            f"got {len(private_MD)} private and {len(pool_ND)} public ones"
        )
    rng = np.random.default_rng(seed)
    private_fold = rng.permutation(np.arange(len(private_MD)) % _FOLDS)
    negatives = rng.permutation(len(pool_ND))[:_MAX_NEGATIVES]
    half_N = np.full(len(pool_ND), -1)
    half_N[negatives] = np.arange(len(negatives)) % 2
    copied_fold_N = _copied_fold(pool_ND, private_MD, private_fold)
    total_N, models_N = np.zeros(len(pool_ND)), np.zeros(len(pool_ND))
    private_scores = np.zeros(len(private_MD))
    for fold, half in itertools.product(range(_FOLDS), (0, 1)):
        own, others = private_MD[private_fold != fold], pool_ND[half_N == half]
        classifier = _classifier(len(private_MD))
        classifier.fit(np.concatenate([own, others]), np.arange(len(own) + len(others)) < len(own))
        scored = np.flatnonzero((half_N != half) & ((copied_fold_N == fold) | (copied_fold_N == -1)))
        for first in range(0, len(scored), _BLOCK):
            rows = scored[first : first + _BLOCK]
            total_N[rows] += classifier.predict_proba(pool_ND[rows])[:, 1]
            models_N[rows] += 1
        held_out = private_fold == fold
        private_scores[held_out] += classifier.predict_proba(private_MD[held_out])[:, 1] / 2
    scores = total_N / models_N
    labels = np.concatenate([np.ones(len(private_MD)), np.zeros(len(negatives))])
    separation = roc_auc_score(labels, np.concatenate([private_scores, scores[negatives]]))
    return Relevance(np.clip(scores, _SMALLEST, 1.0), float(separation))


def _copied_fold(
    pool_ND: NDArray[np.float32], private_MD: NDArray[np.float32], private_fold: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return (N,) the fold of the private text that a pool row is as good as a copy of, -1 for all others."""
    folds = []
    for first in range(0, len(pool_ND), _BLOCK):
        cosines = pool_ND[first : first + _BLOCK] @ private_MD.T
        folds.append(np.where(cosines.max(axis=1) > _COPY, private_fold[cosines.argmax(axis=1)], -1))
    return np.concatenate(folds)


def _classifier(private_texts: int) -> Any:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression

    if private_texts < _FEW:
        return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5])
    return LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000)


def centroid_relevance(pool_ND: NDArray[np.float32], private_MD: NDArray[np.float32], *, seed: int) -> Relevance:
    """Score the pool by cosine to the mean of the client's texts, scaled over the pool to (0, 1].

    All that it uses of the private texts is one vector; it finds a domain far worse than the classifier does.

    Raises:
        SelectionError: if there are no private texts, or all rows of the pool are as close.
    """
    from sklearn.metrics import roc_auc_score

    if len(private_MD) == 0:
        raise SelectionError("centroid relevance needs private texts, got none")
    private = np.asarray(private_MD, dtype=np.float64)
    centroid = private.mean(axis=0)
    cosines_N = np.asarray(pool_ND @ centroid.astype(pool_ND.dtype), dtype=np.float64)
    low, high = cosines_N.min(), cosines_N.max()
    if high - low < _SMALLEST:
        raise SelectionError("all rows of the pool are as close to the client's centroid; it can't tell them apart")
    others = private @ centroid
    if len(private) > 1:  # a text is judged by the mean of the others
        others = (private @ private.sum(axis=0) - 1.0) / (len(private) - 1)
    labels = np.concatenate([np.ones(len(private)), np.zeros(len(pool_ND))])
    separation = roc_auc_score(labels, np.concatenate([others, cosines_N]))
    return Relevance(np.clip((cosines_N - low) / (high - low), _SMALLEST, 1.0), float(separation))


RELEVANCE: dict[str, Callable[..., Relevance]] = {"classifier": classifier_relevance, "centroid": centroid_relevance}
"""Recipe's name of each kind -> function of (pool_ND, private_MD, *, seed)."""
