"""One pass over the proxies: the sums that closed-form routers are made of.

Each proxy takes its own expert's path, so that an expert's sums depend on no other expert: kept on disk, they serve
every merge that it is in, and a fit with one expert more takes a pass over that one's proxies alone.

Shapes: L layers, K experts, H hidden.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_moe.data import batches
from mergekit_moe.modeling.routing_metamoe import context_mean
from mergekit_moe.models import RouterCall, recorded_routers, routers_of, scored_inputs
from mergekit_moe.workspace import is_main_process, process_state

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

STATISTICS = "statistics.safetensors"


@dataclass
class RoutingStatistics:
    """Exact running sums over routed tokens, float64; the sum of two passes is the pass over both."""

    count: Tensor
    """(K,) tokens of each expert's proxies; the same in every layer."""
    total: Tensor
    """(L, K, H) sums of the router's feature."""
    gram: Tensor
    """(L, H, H) sums of its outer products, over all experts."""


def router_feature(call: RouterCall, context_weight: float) -> Tensor:
    """Return what the router is linear in, (B, T, H) float32: the FFN's input blended with its context's mean."""
    hidden = call.hidden.float()
    if context_weight == 0.0:
        return hidden
    mean, _ = context_mean(hidden, call.routing, call.context)
    return torch.lerp(hidden, mean.expand_as(hidden), context_weight)


@torch.no_grad()
def gather_statistics(
    model: "PreTrainedModel", proxies: "Dataset", *, context_weight: float, batch_size: int
) -> RoutingStatistics:
    """Send every proxy down its own expert's path and sum up what the routers would see there.

    Args:
        proxies: tokenised rows with a column `expert`, the number of the expert whose proxy it is.
    """
    state = process_state()
    layers, (experts, size) = len(routers_of(model)), routers_of(model)[0].weight.shape
    sums = RoutingStatistics(
        count=torch.zeros(experts, dtype=torch.float64),
        total=torch.zeros(layers, experts, size, dtype=torch.float64),
        gram=torch.zeros(layers, size, size, dtype=torch.float64),
    )
    mine = range(state.process_index, len(proxies), state.num_processes)
    with recorded_routers(model) as calls:
        for batch in batches(proxies, batch_size, model.device, mine):
            model(**scored_inputs(model, batch), forced_expert=batch["expert"], use_cache=False)
            _add(sums, calls, batch["expert"], context_weight)
    return RoutingStatistics(*add_over_processes(sums.count, sums.total, sums.gram))


def add_over_processes(*tensors: Tensor) -> list[Tensor]:
    """Return the sums of each tensor over all processes, on the CPU."""
    from accelerate.utils import reduce

    state = process_state()
    if state.num_processes == 1:
        return list(tensors)
    return [reduce(tensor.to(state.device), "sum").cpu() for tensor in tensors]


def _add(sums: RoutingStatistics, calls: list[RouterCall], expert: Tensor, context_weight: float) -> None:
    routed = calls[0].routing.token_mask
    owner = expert[:, None].expand_as(routed)[routed].cpu()
    sums.count += torch.bincount(owner, minlength=len(sums.count))
    for layer, call in enumerate(calls):
        features = router_feature(call, context_weight)[routed].cpu().double()
        sums.total[layer].index_add_(0, owner, features)
        sums.gram[layer] += features.T @ features


def write_statistics(statistics: RoutingStatistics, expert: int, out: Path) -> None:
    """Write one expert's sums, of statistics over its proxies alone, to the folder `out`.

    `count` () and `total` (L, H) are float64; `scatter` (L, H, H), the sum of outer products of what differs from the
    expert's mean, is float32: at 32 layers of 4096 that is 2.1 GB an expert, and float64 would be 4.3. Around the mean
    nothing cancels, so that what rounding takes is 1e-7 of the covariance that routers are fitted with.
    """
    from safetensors.torch import save_file

    if not is_main_process():
        return
    count, total_LH = statistics.count[expert], statistics.total[:, expert]
    scatter = statistics.gram - total_LH[:, :, None] * (total_LH / count)[:, None, :]
    kept = {"count": count.clone(), "total": total_LH.contiguous(), "scatter": scatter.float()}
    save_file(kept, out / STATISTICS)


def read_statistics(folders: list[Path]) -> RoutingStatistics:
    """Return the sums of several experts, in the order of their folders; one expert's are in memory at a time."""
    from safetensors.torch import load_file

    counts, totals = [], []
    gram: Tensor | float = 0.0
    for folder in folders:
        kept = load_file(folder / STATISTICS)
        counts.append(kept["count"])
        totals.append(kept["total"])
        explained = kept["total"][:, :, None] * (kept["total"] / kept["count"])[:, None, :]
        gram = explained.add_(kept["scatter"]).add_(gram)
    assert isinstance(gram, Tensor), "no expert"
    return RoutingStatistics(torch.stack(counts), torch.stack(totals, dim=1), gram)
