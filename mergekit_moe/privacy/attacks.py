"""Membership tests: can somebody with a client's published files tell which texts it learnt from?

Shapes: M members (texts learnt from), N others of the same kind, L layers, H hidden size; in tracing N texts,
M public ones.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_FALSE_ALARMS = 0.01
_SHRINKAGE = 0.02
"""Share of a scaled identity in the attacker's covariance."""
_LENGTH = 14
"""Words in a canary."""


def membership(member_M: Sequence[float], other_N: Sequence[float]) -> dict[str, Any]:
    """Return how well scores tell members from others: `auc`, and `tpr_at_1pct_fpr` as published attacks are judged.

    Where others are fewer than 100, no false alarm at all is allowed.
    """
    from sklearn.metrics import roc_auc_score

    labels = np.repeat([1, 0], [len(member_M), len(other_N)])
    others = np.sort(np.asarray(other_N))[::-1]
    threshold = others[math.floor(_FALSE_ALARMS * len(others))]
    return {
        "auc": round(float(roc_auc_score(labels, np.concatenate([member_M, other_N]))), 4),
        "tpr_at_1pct_fpr": round(float(np.mean(np.asarray(member_M) > threshold)), 4),
        "members": len(member_M),
        "others": len(other_N),
    }


def most_allowed(epsilon: float, delta: float) -> float:
    """Return the greatest true positive rate that (epsilon, delta)-DP allows at 1 % false positives.

    Source: Kairouz et al. 2015, Theorem 2.1.
    """
    tightest = 1.0 - math.exp(-epsilon) * (1.0 - delta - _FALSE_ALARMS)
    return min(1.0, math.exp(min(epsilon, 50.0)) * _FALSE_ALARMS + delta, tightest)


def tracing_scores(
    texts_NLH: Tensor, mean_LH: Tensor, *, texts: float, noise_L: Tensor, centre_LH: Tensor, spread_MLH: Tensor
) -> NDArray[np.float64]:
    """Return (N,) how much likelier a published mean is with each text among its own than without, up to constants.

    The best test there is for normal vectors (Neyman and Pearson), layer by layer: unless directions are weighed by how
    much they vary, a few large ones hide everything. It generalises the tracing of Dwork et al. 2015.

    Args:
        mean_LH: published, over `texts` texts.
        noise_L: variance of what each number of it holds of noise for privacy.
        centre_LH: what the attacker takes for the domain's mean, such as that of the proxies.
        spread_MLH: public texts of any kind, for the covariance around their mean.
    """
    scores = torch.zeros(len(texts_NLH), dtype=torch.float64)
    for layer in range(len(mean_LH)):
        spread = spread_MLH[:, layer] - spread_MLH[:, layer].mean(0)
        covariance = spread.T @ spread / len(spread)
        size = len(covariance)
        shrunk = (1.0 - _SHRINKAGE) * covariance + _SHRINKAGE * covariance.trace() / size * torch.eye(size).double()
        variance = shrunk / texts + noise_L[layer] * torch.eye(size).double()
        around = texts_NLH[:, layer] - centre_LH[layer]
        weighed = torch.linalg.solve(variance, around.T).T
        scores += weighed @ (mean_LH[layer] - centre_LH[layer]) - 0.5 * (weighed * around).sum(1) / texts
    return scores.numpy()


def canaries(words: Sequence[str], count: int, seed: int) -> list[str]:
    """Return distinct made-up texts of public words in random order: nothing of them occurs by chance.

    Args:
        words: of the public pool; no private text is looked at.
    """
    rng = np.random.default_rng(seed)
    vocabulary = sorted(set(words))
    made = [" ".join(rng.choice(vocabulary, size=_LENGTH)) for _ in range(count)]
    assert len(set(made)) == count, "a public pool of a handful of words"
    return made
