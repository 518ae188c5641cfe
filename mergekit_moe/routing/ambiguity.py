"""Proxies that are more like another expert's domain: which they are can be told only once all are together."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_moe.data import batches
from mergekit_moe.models import recorded_routers, scored_inputs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_BATCH = 16


def unambiguous(model: "PreTrainedModel", proxies: "Dataset") -> list[int]:
    """Return the rows of which at least half go to their own expert, and of each expert at least half of its rows.

    Args:
        model: with routers that were fitted on all of them.
        proxies: tokenised rows with a column `expert`.
    """
    own_N = own_shares(model, proxies)
    kept: set[int] = set(torch.nonzero(own_N >= 0.5).flatten().tolist())
    for rows in rows_by_expert(proxies).values():
        best = sorted(rows, key=lambda row: -float(own_N[row]))
        kept.update(best[: (len(rows) + 1) // 2])  # one like all the others' is still to be told from them
    return sorted(kept)


def rows_by_expert(proxies: "Dataset") -> dict[int, list[int]]:
    """Return expert -> its rows, in their order."""
    places: dict[int, list[int]] = {}
    for row, expert in enumerate(proxies["expert"]):
        places.setdefault(expert, []).append(row)
    return places


@torch.no_grad()
def own_shares(model: "PreTrainedModel", proxies: "Dataset") -> Tensor:
    """Return (N,) the share of each row's routed tokens, over all layers, that go to its own expert first."""
    model.eval()
    shares = []
    with recorded_routers(model) as calls:
        for batch in batches(proxies, _BATCH, model.device):
            expert = batch["expert"]
            model(**scored_inputs(model, batch), use_cache=False)
            routed = calls[0].routing.token_mask
            right = torch.stack([call.logits.argmax(-1) == expert[:, None] for call in calls]) & routed
            shares.append((right.sum((0, 2)) / (len(calls) * routed.sum(1)).clamp(min=1)).cpu())
    return torch.cat(shares)
