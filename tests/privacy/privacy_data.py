"""Made-up texts as vectors of FFN inputs, for attacks that need thousands of draws.

Each domain has a shift of its own from the public mean (which is zero here), around which its texts vary. There are 384
numbers a text, as the quickstart's seed has; its texts' shifts explain 0.65 to 0.78 of their squared distance from the
public mean (measured), here less, so that more is left to trace. Shapes: N texts, L layers, H hidden size.
"""

import numpy as np
import torch
from torch import Tensor

from mergekit_moe.privacy.attacks import membership, tracing_scores
from mergekit_moe.privacy.statistics import private_statistics
from mergekit_moe.routing.start import centroid

LAYERS, HIDDEN, DOMAINS = 4, 96, 3
SHARE = 0.5
"""Of a text's squared distance from the public mean, what its domain's shift explains."""
TOKEN = 0.15
"""Standard deviation of each number of a token around its text: a router sees tokens, which vary more than texts."""
DELTA = 1e-6


def made_up(texts: int, domain: int, seed: int) -> Tensor:
    """Return (N, L, H) texts of a domain, whose squared norm is 1 on average."""
    size = LAYERS * HIDDEN
    shift = torch.randn(size, generator=torch.Generator().manual_seed(1000 + domain), dtype=torch.float64)
    shift *= SHARE**0.5 / shift.norm()
    drawn = torch.randn(texts, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (shift + drawn * ((1.0 - SHARE) / size) ** 0.5).reshape(texts, LAYERS, HIDDEN)


def published(texts_NLH: Tensor, epsilon: float | None, seed: int) -> dict[str, Tensor]:
    """Return `mean` (L, H) and `noise` (L,), its noise's variance: plain, or as `privacy.statistics` makes them."""
    if epsilon is None:
        return {"mean": texts_NLH.mean(0), "noise": torch.zeros(LAYERS, dtype=torch.float64)}
    zero, rng = torch.zeros(LAYERS, HIDDEN, dtype=torch.float64), np.random.default_rng(seed)
    made, _ = private_statistics(
        iter([texts_NLH]), len(texts_NLH), zero, clip=1.0, epsilon=epsilon, delta=DELTA, name="made-up", rng=rng
    )
    layers = range(LAYERS)
    mean = torch.stack([made[f"layers.{i}.sum"] / made[f"layers.{i}.count"] for i in layers])
    return {"mean": mean, "noise": torch.stack([made[f"layers.{i}.noise_variance"] for i in layers])}


def statistic(texts_NLH: Tensor, epsilon: float | None, seed: int) -> Tensor:
    """Return the published mean (L, H)."""
    return published(texts_NLH, epsilon, seed)["mean"]


def traced(texts: int, epsilon: float | None, seed: int) -> float:
    """Return the AUC of tracing members among as many others, by one who knows the domain's mean and covariance."""
    members, others = made_up(texts, 0, 2 * seed), made_up(texts, 0, 2 * seed + 1)
    made, domain = published(members, epsilon, seed), made_up(4000, 0, 70_000)
    known = {"texts": texts, "centre_LH": domain.mean(0), "spread_MLH": domain}
    scores = [tracing_scores(rows, made["mean"], noise_L=made["noise"], **known).tolist() for rows in (members, others)]
    return float(membership(*scores)["auc"])


def routing_accuracy(texts: int, epsilon: float | None, seed: int) -> float:
    """Return the share of fresh tokens that the closed-form centroid router sends to their own domain, over layers."""
    parts = [published(made_up(texts, d, 50_000 + 10 * seed + d), epsilon, 10 * seed + d) for d in range(DOMAINS)]
    means, noise = (torch.stack([p[key] for p in parts], dim=1) for key in ("mean", "noise"))
    weights, biases = centroid(torch.ones(DOMAINS, dtype=torch.float64), means, noise)
    right = []
    for domain in range(DOMAINS):
        fresh = made_up(500, domain, 90_000 + 10 * seed + domain).float()
        fresh += TOKEN * torch.randn(fresh.shape, generator=torch.Generator().manual_seed(seed))
        logits = torch.einsum("nlh,lkh->nlk", fresh, weights) + biases
        right.append((logits.argmax(-1) == domain).double().mean())
    return float(torch.stack(right).mean())
