"""How relevant each public row is to a client: one function a kind of evidence."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.errors import SelectionError
from mergekit_moe.privacy.accounting import Mechanism
from mergekit_moe.selection.processes import ALONE, Processes

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
    spent: Mechanism | None = None
    """What the scores cost in differential privacy, where they were noised."""


def classifier_relevance(
    pool_ND: NDArray[np.floating], private_MD: NDArray[np.float32], *, seed: int, processes: Processes = ALONE
) -> Relevance:
    """Score the pool by a balanced logistic regression, client's texts against pool (MetaMoE, section 3.1).

    Every score is out of fold on both sides: no row is scored by a classifier that saw it as a negative, nor by
    one that saw a private text that it copies. So a copy of a private text scores as a new text of the domain
    would, and being picked says little about membership. Below 100 private texts the classifier is linear
    discriminant analysis with a shrunk covariance (Ledoit and Wolf 2004).

    Args:
        pool_ND: unit embeddings of the pool; up to 20,000 of them serve as negatives.
        private_MD: unit embeddings of the client's texts.
        processes: each scores its share of the pool; all return the scores of the whole.

    Raises:
        SelectionError: if there are too few rows on either side to hold any out.
    """
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
    share = processes.share(len(pool_ND))
    own_ND, own_half_N = pool_ND[share], half_N[share]
    copied_fold_N = _copied_fold(own_ND, private_MD, private_fold)
    total_N, models_N = np.zeros(len(own_ND)), np.zeros(len(own_ND))
    private_scores = np.zeros(len(private_MD))
    for fold, half in itertools.product(range(_FOLDS), (0, 1)):
        learnt, others = private_MD[private_fold != fold], np.asarray(pool_ND[half_N == half], dtype=np.float32)
        classifier = _classifier(len(private_MD))
        classifier.fit(np.concatenate([learnt, others]), np.arange(len(learnt) + len(others)) < len(learnt))
        scored = np.flatnonzero((own_half_N != half) & ((copied_fold_N == fold) | (copied_fold_N == -1)))
        for first in range(0, len(scored), _BLOCK):
            rows = scored[first : first + _BLOCK]
            total_N[rows] += classifier.predict_proba(np.asarray(own_ND[rows], dtype=np.float32))[:, 1]
            models_N[rows] += 1
        held_out = private_fold == fold
        private_scores[held_out] += classifier.predict_proba(private_MD[held_out])[:, 1] / 2
    scores = processes.join(total_N / models_N)
    separation = _separation(private_scores, scores[negatives])
    return Relevance(np.clip(scores, _SMALLEST, 1.0), separation)


def _copied_fold(
    pool_ND: NDArray[np.floating], private_MD: NDArray[np.float32], private_fold: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return (N,) the fold of the private text that a pool row is as good as a copy of, -1 for all others."""
    folds = [np.zeros(0, dtype=np.int64)]
    for first in range(0, len(pool_ND), _BLOCK):
        cosines = np.asarray(pool_ND[first : first + _BLOCK], dtype=np.float32) @ private_MD.T
        folds.append(np.where(cosines.max(axis=1) > _COPY, private_fold[cosines.argmax(axis=1)], -1))
    return np.concatenate(folds)


def _classifier(private_texts: int) -> Any:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression

    if private_texts < _FEW:
        return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5])
    return LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000)


def private_classifier_relevance(
    pool_ND: NDArray[np.floating],
    private_MD: NDArray[np.float32],
    *,
    epsilon: float,
    delta: float,
    name: str,
    seed: int,
    processes: Processes = ALONE,
) -> Relevance:
    """Score the pool by a classifier that is (epsilon, delta)-differentially private in the client's texts.

    One classifier serves all rows, for each further one would cost as much again; with few steps and public rows by
    the thousand it remembers no row. `separation` is not private: it stays with the client.

    Args:
        private_MD: unit embeddings of all of the client's texts.
        name: the expert's name, for errors.

    Raises:
        PrivacyError: if there are too few texts for the epsilon.
    """
    from mergekit_moe.privacy.classifier import private_classifier, probabilities

    sample = np.sort(np.random.default_rng(seed).permutation(len(pool_ND))[:_MAX_NEGATIVES])
    public = np.asarray(pool_ND[sample], dtype=np.float64)
    # Each process would draw noise of its own, and several classifiers tell more than one.
    fitted = None
    if processes.rank == 0:
        fitted = private_classifier(private_MD, public, epsilon=epsilon, delta=delta, name=name)
    weights, spent = processes.from_first(fitted)
    own_ND, centre, scores = pool_ND[processes.share(len(pool_ND))], public.mean(axis=0), [np.zeros(0)]
    for first in range(0, len(own_ND), _BLOCK):
        scores.append(probabilities(own_ND[first : first + _BLOCK], centre, weights))
    scores_N = processes.join(np.concatenate(scores))
    separation = _separation(probabilities(private_MD, centre, weights), scores_N[sample])
    return Relevance(np.clip(scores_N, _SMALLEST, 1.0), separation, spent)


def centroid_relevance(
    pool_ND: NDArray[np.floating], private_MD: NDArray[np.float32], *, seed: int, processes: Processes = ALONE
) -> Relevance:
    """Score the pool by cosine to the mean of the client's texts, scaled over the pool to (0, 1].

    All that it uses of the private texts is one vector; it finds a domain far worse than the classifier does.

    Raises:
        SelectionError: if there are no private texts, or all rows of the pool are as close.
    """
    if len(private_MD) == 0:
        raise SelectionError("centroid relevance needs private texts, got none")
    private = np.asarray(private_MD, dtype=np.float64)
    total = private.sum(axis=0)
    cosines_N = _cosines(pool_ND, total / len(private), processes)
    others = private @ total / len(private)
    if len(private) > 1:  # a text is judged by the mean of the others
        others = (private @ total - 1.0) / (len(private) - 1)
    return Relevance(_scaled(cosines_N, "centroid"), _separation(others, cosines_N))


def prompts_relevance(
    pool_ND: NDArray[np.floating], prompts_PD: NDArray[np.float32], *, seed: int, processes: Processes = ALONE
) -> Relevance:
    """Score the pool by a few sentences that describe the domain; no private text is needed.

    A row's score is its mean cosine to the sentences, all less the pool's mean (what the whole pool has in common
    counts for nothing), scaled over the pool to (0, 1].

    Args:
        prompts_PD: unit embeddings of the sentences, at least one.

    Raises:
        SelectionError: if there is no sentence, or all rows of the pool are as close.
    """
    if len(prompts_PD) == 0:
        raise SelectionError("prompts relevance needs at least one sentence, got none")
    sample = np.sort(np.random.default_rng(seed).permutation(len(pool_ND))[:_MAX_NEGATIVES])
    mean = np.asarray(pool_ND[sample], dtype=np.float64).mean(axis=0)
    prompts = _directions(prompts_PD - mean)
    own_ND = pool_ND[processes.share(len(pool_ND))]
    cosines = [np.zeros(0)]
    for first in range(0, len(own_ND), _BLOCK):
        cosines.append(_directions(own_ND[first : first + _BLOCK] - mean) @ prompts.mean(axis=0))
    cosines_N = processes.join(np.concatenate(cosines))
    # A sentence is judged by the others.
    among = (prompts @ prompts.sum(axis=0) - 1.0) / max(1, len(prompts) - 1)
    return Relevance(_scaled(cosines_N, "sentences"), _separation(among, cosines_N))


def _cosines(pool_ND: NDArray[np.floating], vector_D: NDArray[Any], processes: Processes) -> NDArray[np.float64]:
    own_ND = pool_ND[processes.share(len(pool_ND))]
    blocks = [own_ND[first : first + _BLOCK] @ vector_D for first in range(0, len(own_ND), _BLOCK)]
    return processes.join(np.concatenate([np.zeros(0), *blocks]))


def _directions(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _SMALLEST)


def _scaled(values_N: NDArray[np.float64], to: str) -> NDArray[np.float64]:
    low, high = values_N.min(), values_N.max()
    if high - low < _SMALLEST:
        raise SelectionError(f"all rows of the pool are as close to the client's {to}; it can't tell them apart")
    return np.clip((values_N - low) / (high - low), _SMALLEST, 1.0)


def _separation(own: NDArray[np.float64], pool: NDArray[np.float64]) -> float:
    from sklearn.metrics import roc_auc_score

    labels = np.concatenate([np.ones(len(own)), np.zeros(len(pool))])
    return float(roc_auc_score(labels, np.concatenate([own, pool])))


RELEVANCE: dict[str, Callable[..., Relevance]] = {
    "classifier": classifier_relevance,
    "centroid": centroid_relevance,
    "prompts": prompts_relevance,
}
"""Recipe's name of each kind -> function of (pool_ND, embeddings of texts or sentences, *, seed, processes)."""
