"""How relevant each public row is to a client: one function a kind of evidence."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.errors import SelectionError

_MAX_NEGATIVES = 20_000
_FOLDS = 5
_SMALLEST = 1e-6


class Relevance(NamedTuple):
    """Scores of the pool's rows for one client."""

    scores: NDArray[np.float64]
    """(N,) in (0, 1]: estimated P(row is the client's | row), at equal priors."""
    separation: float
    """Area under the ROC curve, client's texts against pool, out of fold: 0.5 is 'can't tell them apart'."""


def classifier_relevance(pool_ND: NDArray[np.float32], private_MD: NDArray[np.float32], *, seed: int) -> Relevance:
    """Score the pool by a balanced logistic regression, client's texts against pool (MetaMoE, section 3.1).

    Every score is out of fold: no row is scored by a classifier that saw it as a negative.

    Args:
        pool_ND: unit embeddings of the pool; up to 20,000 of them serve as negatives.
        private_MD: unit embeddings of the client's texts.

    Raises:
        SelectionError: if there are too few rows on either side to hold any out.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    if len(private_MD) < 2 * _FOLDS or len(pool_ND) < 2 * _FOLDS:
        raise SelectionError(
            f"a relevance classifier needs at least {2 * _FOLDS} rows on both sides, "
            f"got {len(private_MD)} private and {len(pool_ND)} public ones"
        )
    rng = np.random.default_rng(seed)
    negatives = rng.permutation(len(pool_ND))[:_MAX_NEGATIVES]
    negative_fold = np.arange(len(negatives)) % _FOLDS
    private_fold = rng.permutation(np.arange(len(private_MD)) % _FOLDS)
    never_seen = np.setdiff1d(np.arange(len(pool_ND)), negatives)
    scores = np.zeros(len(pool_ND))
    private_scores = np.zeros(len(private_MD))
    for fold in range(_FOLDS):
        seen = negatives[negative_fold != fold]
        own = private_MD[private_fold != fold]
        classifier = LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000)
        classifier.fit(np.concatenate([own, pool_ND[seen]]), np.arange(len(own) + len(seen)) < len(own))
        held_out = negatives[negative_fold == fold]
        scores[held_out] = classifier.predict_proba(pool_ND[held_out])[:, 1]
        private_scores[private_fold == fold] = classifier.predict_proba(private_MD[private_fold == fold])[:, 1]
        if len(never_seen):
            scores[never_seen] += classifier.predict_proba(pool_ND[never_seen])[:, 1] / _FOLDS
    labels = np.concatenate([np.ones(len(private_MD)), np.zeros(len(negatives))])
    separation = roc_auc_score(labels, np.concatenate([private_scores, scores[negatives]]))
    return Relevance(np.clip(scores, _SMALLEST, 1.0), float(separation))
