"""Where routers start: each returns weights (L, K, H) and biases (L, K), float32.

Those of the proxies' statistics are centred and carry a bias: hidden states share a large common mean, and without
both an expert whose vector is merely longer wins every token, as `means` shows.

Routers that need no proxies are made by the merge (merging/gates.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_moe.errors import DataError
from mergekit_moe.matching import body_of
from mergekit_moe.models import load_network
from mergekit_moe.router_recipe import Router
from mergekit_moe.routing import seed_rows
from mergekit_moe.routing.statistics import RoutingStatistics, gather_statistics, read_statistics

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 16


@dataclass
class Material:
    """What a router can start from; what takes a pass over the proxies is made when it is asked for."""

    model: Any
    proxies: "Dataset"
    """Tokenised, with a column `expert`: those to fit on."""
    settings: Router
    seed: int
    published: dict[str, Tensor]
    """The clients' own statistics: `count` (K,), `sum` (L, K, H) and `noise` (L, K)."""
    base: Path | None
    """The seed model's folder."""
    gathered: list[Path]
    """Folders with each expert's statistics, where they are known already."""

    @cached_property
    def statistics(self) -> RoutingStatistics:
        if self.gathered:
            return read_statistics(self.gathered)
        return gather_for(self.model, self.proxies, self.settings, self.base)

    def only(self, rows: list[int]) -> "Material":
        """Return the same with these of the proxies alone, which are passed over anew."""
        return replace(self, proxies=self.proxies.select(rows), gathered=[])

    def by_seed(self, rows: Callable[[Any, Any, "Dataset"], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the rows that one of `seed_rows` makes, without bias."""
        assert self.base is not None, "no seed model"
        weights = rows(body_of(load_network(self.base)).eval(), self.model.config, self.proxies)
        return weights, torch.zeros(weights.shape[:2])


def gather_for(model: Any, proxies: "Dataset", settings: Router, base: Path | None) -> RoutingStatistics:
    """Return the statistics that a router of these settings is fitted on.

    Args:
        base: the seed model's folder; without it, the own experts' path has to do.
    """
    weight = settings.context_weight if settings.context != "none" else 0.0
    seed = None if base is None else body_of(load_network(base)).eval()
    return gather_statistics(model, proxies, context_weight=weight, batch_size=_BATCH, seed=seed)


def lda(statistics: RoutingStatistics, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Shrunk linear discriminant analysis; experts weigh alike.

    With S0 the mean of the experts' own covariances, S is (1 - s) S0 + s diag(S0); row p is S^-1 (mu_p - mu), its bias
    -(mu_p - mu)' S^-1 (mu_p + mu) / 2 with mu the mean of the experts' means.
    """
    means, within = _means_and_within(statistics)
    centre = means.mean(dim=1, keepdim=True)
    weights = _solved(_shrunk(within, shrinkage), (means - centre).transpose(1, 2)).transpose(1, 2)
    return _with_bias(weights, means, centre)


def ridge(statistics: RoutingStatistics, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Ridge regression of one-hot experts on the feature, from X'X and X'Y alone, experts weighing alike.

    X'X / n is the mean of the experts' covariances, as in `lda`, plus the covariance of their means; X'Y / n is
    (mu_p - mu) / K. Both are centred, and the intercept is the bias. It is shrunk as lda's: (1 - s) X'X + s diag(X'X).
    """
    means, within = _means_and_within(statistics)
    experts, centre = means.shape[1], means.mean(dim=1, keepdim=True)
    apart = means - centre
    scatter = _shrunk(within + apart.transpose(1, 2) @ apart / experts, shrinkage)
    weights = _solved(scatter, apart.transpose(1, 2) / experts).transpose(1, 2)
    biases = 1.0 / experts - (weights * centre).sum(-1)
    return weights.float(), biases.float()


def _means_and_within(statistics: RoutingStatistics) -> tuple[Tensor, Tensor]:
    """Return the experts' means (L, K, H) and the mean of the covariances around each (L, H, H)."""
    means = statistics.total / statistics.count[None, :, None]
    return means, statistics.second - means.transpose(1, 2) @ means / means.shape[1]


def _shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    """Return (1 - s) S + s diag(S): towards each dimension's own variance, of which a few are far larger."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    return (1.0 - shrinkage) * covariance + torch.diag_embed(shrinkage * variance + 1e-12)


def _solved(covariance: Tensor, right: Tensor) -> Tensor:
    """Return covariance^-1 right, by Cholesky: a covariance is symmetric and positive, or has no inverse.

    Raises:
        DataError: if it has none.
    """
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed.any():
        raise DataError(
            "the covariance of what routers see on the proxies has no inverse: there are fewer tokens than hidden "
            "dimensions; raise router.shrinkage above 0, or give more proxies"
        )
    return torch.cholesky_solve(right, factor)


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


def means(counts_K: Tensor, sums_LKH: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors that clients publish as they are: e_p of MetaMoE, section 3.3, by a plain dot product.

    Here to reproduce the paper. Nothing bounds a row: a client that publishes a longer vector is sent more.
    """
    weights = (sums_LKH / counts_K[None, :, None]).float()
    return weights, torch.zeros(weights.shape[:2])


def linear(layers: int, experts: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Small random numbers (standard deviation 0.02), for training to replace (BTX, Sukhbaatar et al. 2024)."""
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(layers, experts, size, generator=generator), torch.zeros(layers, experts)


def _with_bias(weights: Tensor, means: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    bias = -0.5 * (weights * (means + centre)).sum(-1)
    return weights.float(), bias.float()


def _linear(material: Material) -> tuple[Tensor, Tensor]:
    config = material.model.config
    return linear(config.sized.num_hidden_layers, len(config.experts), config.sized.hidden_size, material.seed)


AS_THEY_ARE = ("means", "linear")
"""Starts that are taken at the temperature that they come at: as published."""

STARTS: dict[str, Callable[[Material], tuple[Tensor, Tensor]]] = {
    "lda": lambda given: lda(given.statistics, given.settings.shrinkage),
    "ridge": lambda given: ridge(given.statistics, given.settings.shrinkage),
    "centroid": lambda given: centroid(given.published["count"], given.published["sum"], given.published["noise"]),
    "means": lambda given: means(given.published["count"], given.published["sum"]),
    "linear": _linear,
    "flexolmo": lambda given: given.by_seed(seed_rows.flexolmo),
    "hidden": lambda given: given.by_seed(seed_rows.hidden),
    "cheap-embed": lambda given: given.by_seed(seed_rows.cheap_embed),
}
"""`router.start` -> how it is made, of the starts that are fitted after the merge."""
