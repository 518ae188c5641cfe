"""Closed-form routers. Each returns weights (L, K, H) and biases (L, K), float32.

All are centred and carry a bias: hidden states share a large common mean, and without both an expert
whose vector is merely longer would win every token.
"""

import torch
from torch import Tensor

from mergekit_moe.routing.statistics import RoutingStatistics


def lda(statistics: RoutingStatistics, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Shrunk linear discriminant analysis with equal priors.

    The pooled within-expert covariance S is (1 - s) S + s tr(S)/H I; row p is S^-1 (mu_p - mu), its bias
    -(mu_p - mu)' S^-1 (mu_p + mu) / 2 with mu the mean of the experts' means.
    """
    means = statistics.total / statistics.count[None, :, None]
    explained = torch.einsum("k,lkh,lkg->lhg", statistics.count, means, means)
    within = (statistics.gram - explained) / statistics.count.sum()
    size = within.shape[-1]
    average = within.diagonal(dim1=-2, dim2=-1).mean(-1)
    within = (1.0 - shrinkage) * within + (shrinkage * average + 1e-12)[:, None, None] * torch.eye(size).double()
    centre = means.mean(dim=1, keepdim=True)
    weights = torch.linalg.solve(within, (means - centre).transpose(1, 2)).transpose(1, 2)
    return _with_bias(weights, means, centre)


def centroid(counts_K: Tensor, sums_LKH: Tensor, noise_LK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The nearest centred mean, from the vectors that clients publish (MetaMoE, section 3.3, made fair).

    Row p is mu_p - mu, so that the logit falls with the squared distance to mu_p whatever its norm is.

    Args:
        noise_LK: variance of each number of a mean that is noise for privacy. It makes mu_p longer than it is, by
            H times as much in the square, and a client that noises more would be sent less.
    """
    means = sums_LKH / counts_K[None, :, None]
    centre = means.mean(dim=1, keepdim=True)
    weights, biases = _with_bias(means - centre, means, centre)
    if noise_LK is not None:
        biases = biases + (0.5 * means.shape[-1] * noise_LK).float()
    return weights, biases


def _with_bias(weights: Tensor, means: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    bias = -0.5 * (weights * (means + centre)).sum(-1)
    return weights.float(), bias.float()
