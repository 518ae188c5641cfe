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
    """Exact running sums over routed tokens, float64."""

    count: Tensor
    """(K,) tokens of each expert's proxies; the same in every layer."""
    total: Tensor
    """(L, K, H) sums of the router's feature."""
    second: Tensor
    """(L, H, H) each expert's mean outer product of the feature, averaged over experts: they weigh alike, however
    much text each has. By tokens instead, experts of short texts lose to those of long ones."""


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
    layers, (experts, size) = len(routers_of(model)), routers_of(model)[0].weight.shape
    count = torch.zeros(experts, dtype=torch.float64)
    total = torch.zeros(layers, experts, size, dtype=torch.float64)
    second = torch.zeros(layers, size, size, dtype=torch.float64)
    owners = torch.tensor(proxies["expert"])
    present = owners.unique().tolist()
    for expert in present:
        own = proxies.select((owners == expert).nonzero()[:, 0].tolist())
        count[expert], total[:, expert], gram = _sums(model, own, context_weight, batch_size)
        second += gram / (count[expert] * len(present))
    return RoutingStatistics(count, total, second)


def _sums(model: "PreTrainedModel", rows: "Dataset", context_weight: float, batch_size: int) -> list[Tensor]:
    """Return one expert's count (), total (L, H) and sums of outer products (L, H, H), over all processes."""
    state, size = process_state(), routers_of(model)[0].weight.shape[1]
    count = torch.zeros((), dtype=torch.float64)
    total = torch.zeros(len(routers_of(model)), size, dtype=torch.float64)
    gram = torch.zeros(len(total), size, size, dtype=torch.float64)
    mine = range(state.process_index, len(rows), state.num_processes)
    with recorded_routers(model) as calls:
        for batch in batches(rows, batch_size, model.device, mine):
            model(**scored_inputs(model, batch), forced_expert=batch["expert"], use_cache=False)
            routed = calls[0].routing.token_mask
            count += int(routed.sum())
            for layer, call in enumerate(calls):
                features = router_feature(call, context_weight)[routed].cpu().double()
                total[layer] += features.sum(0)
                gram[layer] += features.T @ features
    return add_over_processes(count, total, gram)


def add_over_processes(*tensors: Tensor) -> list[Tensor]:
    """Return the sums of each tensor over all processes, on the CPU."""
    from accelerate.utils import reduce

    state = process_state()
    if state.num_processes == 1:
        return list(tensors)
    return [reduce(tensor.to(state.device), "sum").cpu() for tensor in tensors]


def write_statistics(statistics: RoutingStatistics, expert: int, out: Path) -> None:
    """Write one expert's sums, of statistics over its proxies alone, to the folder `out`.

    `count` () and `total` (L, H) are float64; `covariance` (L, H, H) is float32: at 32 layers of 4096 that is 2.1 GB an
    expert, and float64 would be 4.3. Around the mean nothing cancels, so that what rounding takes is 1e-7 of it.
    """
    from safetensors.torch import save_file

    if not is_main_process():
        return
    count, total_LH = statistics.count[expert], statistics.total[:, expert]
    covariance = statistics.second - _outer(total_LH / count)
    kept = {"count": count.clone(), "total": total_LH.contiguous(), "covariance": covariance.float()}
    save_file(kept, out / STATISTICS)


def read_statistics(folders: list[Path]) -> RoutingStatistics:
    """Return the sums of several experts, in the order of their folders; one expert's are in memory at a time."""
    from safetensors.torch import load_file

    counts, totals = [], []
    second: Tensor | float = 0.0
    for folder in folders:
        kept = load_file(folder / STATISTICS)
        counts.append(kept["count"])
        totals.append(kept["total"])
        own = _outer(kept["total"] / kept["count"]).add_(kept["covariance"])
        second = own.div_(len(folders)).add_(second)
    assert isinstance(second, Tensor), "no expert"
    return RoutingStatistics(torch.stack(counts), torch.stack(totals, dim=1), second)


def _outer(mean_LH: Tensor) -> Tensor:
    return mean_LH[:, :, None] * mean_LH[:, None, :]
