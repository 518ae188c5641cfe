"""Routers without context and without bias: all that a native MoE family's gate can say.

Shapes: L layers, K experts, H hidden.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_moe.modeling.experts_metamoe import MoeBlock
from mergekit_moe.models import only_chooses, routers_of
from mergekit_moe.routing import start
from mergekit_moe.routing.statistics import gather_statistics
from mergekit_moe.routing.training import fit_temperature

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_BATCH = 16
_RIDGE = 1e-8


def fold_bias(weight_KH: Tensor, bias_K: Tensor, mean_H: Tensor, second_HH: Tensor) -> Tensor:
    """Return w' = w + b S^-1 m, the plain weights nearest to w h + b in mean square; float32.

    Args:
        mean_H: m, the mean of the features h.
        second_HH: S, the mean of h h'; a ridge of 1e-8 of its mean diagonal keeps it solvable.
    """
    second = second_HH.double()
    ridge = _RIDGE * second.diagonal().mean() + torch.finfo(torch.float64).tiny
    direction = torch.linalg.solve(second + ridge * torch.eye(len(second)).double(), mean_H.double())
    return (weight_KH.double() + bias_K.double()[:, None] * direction).float()


def plain_gates(model: "PreTrainedModel", proxies: "Dataset", shrinkage: float = 0.1) -> tuple[Tensor, str]:
    """Return gates (L, K, H), float32, and how they came about; the model's own routers become these gates.

    A router that goes by its token alone keeps its weights and gets its bias folded in; one with context, or that adds
    up layers, is fitted again, as LDA on the tokens' own FFN inputs, at the temperature that suits it and, with several
    experts a token, the task. Token by token it takes other settings than with context: a little shrinkage and the own
    experts' path alone read the language benchmark at 3.628 nats a token, the covariance's diagonal or the seed's path,
    too, at 3.636 to 3.642 (60 rows a domain, one seed).

    Args:
        proxies: tokenised rows with a column `expert`, at least one of every expert.
    """
    model.eval()
    routers = routers_of(model)
    for block in model.modules():
        # The normalisation changes no choice, and what was fitted with it is better conditioned.
        if isinstance(block, MoeBlock) and hasattr(block, "input_norm"):
            block.input_norm = block.input_norm and only_chooses(model.config)
    statistics = gather_statistics(model, proxies, context_weight=0.0, batch_size=_BATCH)
    again = (
        model.config.router_context != "none"
        or model.config.router_absolute_scores
        or model.config.router_adds_layers
        or (model.config.router_input_norm and not only_chooses(model.config))
    )
    if again:
        weights, biases = start.lda(statistics, shrinkage)
    else:
        weights = torch.stack([router.weight.detach().cpu() for router in routers])
        biases = torch.stack([router.bias.detach().cpu() for router in routers])
    means = statistics.total / statistics.count[None, :, None]
    with torch.no_grad():
        for layer, router in enumerate(routers):
            folded = fold_bias(weights[layer], biases[layer], means[layer].mean(0), statistics.second[layer])
            router.weight.copy_(folded)
            router.bias.zero_()
            router.context_logit = None
            router.absolute = router.adds_layers = False
    if again:
        fit_temperature(model, proxies)
    how = "fitted again without context (LDA), bias folded in" if again else "as trained, bias folded in"
    return torch.stack([router.weight.detach().cpu() for router in routers]), how
