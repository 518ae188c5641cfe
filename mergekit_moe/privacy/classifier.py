"""A relevance classifier of which any one private text can change little: logistic regression by noised gradients.

Abadi et al. 2016, Algorithm 1, with all private texts in every step. The gradient on the pool's rows takes no noise,
for they are public; whatever is computed from the classifier and the pool is free post-processing.
Shapes: M private texts, N public rows, D embedding size, F = D + 1 features.
"""

import math

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.privacy.accounting import Mechanism, account, gaussian_sigma, require_few_enough, require_signal
from mergekit_moe.privacy.noise import clip_rows, clipped_sum, fresh_generator, gaussian, noise_to_signal

_STEPS = 5
"""Few: noise a step grows with their root, and on unit embeddings five steps find most of what there is."""
_CLIP = 0.5
"""Of a text's gradient: what it is at the start, where every text is as likely as not."""
_RIDGE = 0.003
_INTERCEPT = 0.5
"""Value of the constant feature, beside embeddings of norm 1."""


def private_classifier(
    private_MD: NDArray[np.floating],
    public_ND: NDArray[np.floating],
    *,
    epsilon: float,
    delta: float,
    name: str,
    rng: np.random.Generator | None = None,
) -> tuple[NDArray[np.float64], Mechanism]:
    """Return the (F,) weights for `features` that tell private texts from public ones, and what they cost.

    Args:
        private_MD: unit embeddings of all the client's texts: a sample of them would have to be accounted for.
        public_ND: unit embeddings of public rows; they give the mean, the negatives and the step size.
        name: the expert's name, for errors.
        rng: the noise's; by default fresh from the operating system, and anything else is for tests.

    Raises:
        PrivacyError: if delta allows to publish a row, or there are too few texts for the epsilon.
    """
    rows, who = len(private_MD), f"expert '{name}', privacy.relevance"
    require_few_enough(delta, rows, who=who)
    # Steps that may each see what those before them published compose as one Gaussian mechanism does.
    sigma = gaussian_sigma(epsilon, delta) * math.sqrt(_STEPS)
    ratio = noise_to_signal(sigma, public_ND.shape[1] + 1, rows=rows, steps=_STEPS)
    require_signal(ratio, epsilon, rows, what=who)
    centre = np.asarray(public_ND, dtype=np.float64).mean(axis=0)
    private, public = features(private_MD, centre), features(public_ND, centre)
    weights = descend(private, public, sigma=sigma, rng=rng or fresh_generator())
    mechanism = Mechanism(
        name="relevance",
        mechanism="Gaussian mechanism on the sum of clipped gradients, all rows in each step (Abadi et al. 2016)",
        epsilon=epsilon,
        delta=delta,
        noise_multiplier=sigma,
        sampling_probability=1.0,
        steps=_STEPS,
        noise_to_signal=ratio,
        parameters={"clip": _CLIP, "rows": rows, "ridge": _RIDGE, "unit": "gradient of a logistic regression"},
    )
    return weights, account(mechanism)


def features(rows_ND: NDArray[np.floating], centre_D: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (N, F) features of norm at most 1: rows less the public mean, clipped to norm 1, and a constant."""
    centred = clip_rows(np.asarray(rows_ND, dtype=np.float64) - centre_D, 1.0)
    constant = np.full((len(centred), 1), _INTERCEPT)
    return np.concatenate([centred, constant], axis=1) / math.hypot(1.0, _INTERCEPT)


def descend(
    private_MF: NDArray[np.float64], public_NF: NDArray[np.float64], *, sigma: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return the mean of the later half of the iterates of noised gradient descent from zero.

    The objective is half the mean logistic loss on each side plus a ridge. Private texts enter only by the sum of
    their gradients, each clipped to norm C, plus normal noise of standard deviation sigma * C, over M.
    """
    size = public_NF.shape[1]
    curvature = np.linalg.norm(public_NF.T @ public_NF / len(public_NF), 2) / 4.0
    weights, kept = np.zeros(size), np.zeros(size)
    for step in range(_STEPS):
        gradients = -_sigmoid(-private_MF @ weights)[:, None] * private_MF
        noised = clipped_sum(gradients, _CLIP) + gaussian(size, sigma * _CLIP, rng)
        public = (_sigmoid(public_NF @ weights)[:, None] * public_NF).mean(axis=0)
        gradient = 0.5 * (noised / len(private_MF) + public) + _RIDGE * weights
        weights = weights - gradient / (curvature + _RIDGE)
        kept += weights * (step >= _STEPS // 2)
    return kept / (_STEPS - _STEPS // 2)


def probabilities(
    rows_ND: NDArray[np.floating], centre_D: NDArray[np.float64], weights_F: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return (N,) estimated P(row is the client's | row), at equal priors."""
    return _sigmoid(features(rows_ND, centre_D) @ weights_F)


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.special import expit

    return expit(values)
