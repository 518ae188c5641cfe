"""What routers are trained by. Each loss is a sum over this process's tokens, divided by counts of the whole step.

A step's batch may be spread over processes and over micro-batches (gradient accumulation): added up over all of
them, the losses are those of the batch in one piece. Only the balance looks at one micro-batch at a time: how its
tokens were shared out isn't known before the model has seen them.

Shapes: B batch, T tokens, K experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mergekit_moe.data import to_learn
from mergekit_moe.models import RouterCall


class Counts(NamedTuple):
    """What a step's batch holds, over all its micro-batches and processes."""

    labels: Tensor
    """() tokens to be predicted."""
    routed: Tensor
    """(K,) routed tokens of each expert's proxies."""

    def __add__(self, other: "Counts") -> "Counts":  # type: ignore[override]
        return Counts(self.labels + other.labels, self.routed + other.routed)


def count(labels: Tensor, routed: Tensor, expert: Tensor, experts: int) -> Counts:
    """Return a batch's counts.

    Args:
        labels: (B, T); an encoder's (B,).
        routed: (B, T) bool.
        expert: (B,) numbers of the experts.
    """
    return Counts(to_learn(labels).sum(), torch.bincount(_owners(routed, expert), minlength=experts))


def domain_loss(calls: list[RouterCall], expert: Tensor, routed_K: Tensor | None = None) -> Tensor:
    """Cross-entropy of the routed tokens to the expert whose proxy they belong to, averaged over layers.

    Experts weigh alike, as in the closed form, however many tokens of each the batch holds.

    Args:
        expert: (B,) numbers of the experts.
        routed_K: routed tokens of each expert in the step; this batch's where not given.
    """
    routed = calls[0].routing.token_mask
    owner = _owners(routed, expert)
    if routed_K is None:
        routed_K = torch.bincount(owner, minlength=calls[0].logits.shape[-1])
    weight = 1.0 / routed_K[owner]
    losses = [(F.cross_entropy(call.logits[routed], owner, reduction="none") * weight).sum() for call in calls]
    return torch.stack(losses).mean() / routed_K.count_nonzero()


def z_loss(calls: list[RouterCall], routed_tokens: Tensor) -> Tensor:
    """Mean squared logsumexp of the router's logits (ST-MoE, Eq. 5), over layers and `routed_tokens` tokens."""
    routed = calls[0].routing.token_mask
    squares = [call.logits[routed].logsumexp(-1).square().sum() for call in calls]
    return torch.stack(squares).mean() / routed_tokens


def balance_loss(
    calls: list[RouterCall], top_k: int, routed_tokens: Tensor, *, add: Callable[[Tensor], Tensor] = lambda part: part
) -> Tensor:
    """Switch Transformer's load-balancing loss (Eq. 4 to 6): K * sum of share of tokens * mean probability.

    Args:
        routed_tokens: (), of the step.
        add: sums a tensor over all processes: the shares are those of all that is forwarded at once.
    """
    routed = calls[0].routing.token_mask
    logits = torch.stack([call.logits[routed] for call in calls])
    experts = logits.shape[-1]
    chosen = add(F.one_hot(logits.topk(top_k).indices, experts).sum((0, 1, 2)).float())
    share_K = chosen / (chosen.sum() / top_k).clamp(min=1.0)
    return experts * (share_K * logits.softmax(-1).sum((0, 1))).sum() / (len(calls) * routed_tokens)


def _owners(routed: Tensor, expert: Tensor) -> Tensor:
    """Return the expert of each routed token, (n,)."""
    return expert[:, None].expand_as(routed)[routed]
