"""Routers made of what the seed alone, without any expert, makes of each expert's proxies.

Each returns unit-length weights (L, K, H), float32, for a plain dot product: no row can be made to win by making it
longer. A row depends on its own expert's proxies alone. Shapes: L layers, K experts, H hidden, B batch, T tokens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mergekit_moe.data import batches
from mergekit_moe.models import counted_tokens, recorded_ffn_inputs, scored_inputs
from mergekit_moe.routing.statistics import add_over_processes
from mergekit_moe.workspace import process_state

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 16


def flexolmo(seed: Any, config: Any, proxies: "Dataset") -> Tensor:
    """FlexOlmo's domain embeddings (Shi et al., arXiv 2507.07024, its domain-informed router), in the seed's own space.

    There a row starts as the mean embedding of sample documents of the expert's data by an embedder of its own, the
    same in every layer. Ours is the mean FFN input of the seed over the expert's proxies, a row for each layer, so
    that any hidden size will do and a row lies where the tokens lie that it is compared with; and of unit length.
    """

    def look(batch: dict[str, Tensor]) -> list[Tensor]:
        with recorded_ffn_inputs(seed) as inputs:
            seed(**batch, use_cache=False)
        if config.router_input_norm:
            return [F.rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-6) for hidden in inputs]
        return inputs

    return _unit_means(seed, config, proxies, look)


def hidden(seed: Any, config: Any, proxies: "Dataset") -> Tensor:
    """mergekit-moe's `gate_mode: hidden`: the mean of what goes into each layer, over proxies in place of prompts."""

    def look(batch: dict[str, Tensor]) -> list[Tensor]:
        return list(seed(**batch, use_cache=False, output_hidden_states=True).hidden_states[:-1])

    return _unit_means(seed, config, proxies, look)


def cheap_embed(seed: Any, config: Any, proxies: "Dataset") -> Tensor:
    """mergekit-moe's `gate_mode: cheap_embed`: the mean token embedding, the same row in every layer."""

    def look(batch: dict[str, Tensor]) -> list[Tensor]:
        return [seed.get_input_embeddings()(batch["input_ids"])] * config.num_hidden_layers

    return _unit_means(seed, config, proxies, look)


@torch.no_grad()
def _unit_means(
    seed: Any, config: Any, proxies: "Dataset", look: Callable[[dict[str, Tensor]], list[Tensor]]
) -> Tensor:
    """Return the unit-length means over routed tokens of what `look` sees, a (B, T, H) a layer."""
    state = process_state()
    mine = range(state.process_index, len(proxies), state.num_processes)
    sums = torch.zeros(
        config.sized.num_hidden_layers, len(config.experts), config.sized.hidden_size, dtype=torch.float64
    )
    for batch in batches(proxies, _BATCH, seed.device, mine):
        layers = look(scored_inputs(seed, batch))
        routed = counted_tokens(batch, layers[0], list(config.router_excluded_token_ids))
        owner = batch["expert"][:, None].expand_as(routed)[routed].cpu()
        for total, seen in zip(sums, layers, strict=True):
            total.index_add_(0, owner, seen[routed].cpu().double())
    return F.normalize(add_over_processes(sums)[0], dim=-1).float()
