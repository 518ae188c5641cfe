"""Dense merges to compare with, one function each over the same stream: tensor by tensor, every weight of the model.

Shapes: K experts; a change is an expert's tensor less the base's, float32.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mergekit_moe.experts import Base, Expert, require_keepable
from mergekit_moe.merging.heads import joined_head
from mergekit_moe.merging.output import copy_companions, in_type, typed_config, write_checkpoint
from mergekit_moe.recipe import Merge
from mergekit_moe.updates import wide
from mergekit_moe.weights import Planned
from mergekit_moe.workspace import digest, write_json

Combine = Callable[[list[Tensor], Merge, torch.Generator], Tensor]


def soup(changes: list[Tensor], merge: Merge, generator: torch.Generator) -> Tensor:
    """Return the mean change (Wortsman et al. 2022)."""
    return _total(changes) / len(changes)


def task_arithmetic(changes: list[Tensor], merge: Merge, generator: torch.Generator) -> Tensor:
    """Return the scaled sum of the changes (Ilharco et al. 2023)."""
    return _scaling(merge) * _total(changes)


def ties(changes: list[Tensor], merge: Merge, generator: torch.Generator) -> Tensor:
    """Trim each change to its largest values, elect each weight's sign, average who agrees (Yadav et al. 2023)."""
    trimmed = [_largest(change, merge.density or 0.2) for change in changes]
    sign = torch.sign(_total(trimmed))
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for change in trimmed:
        agrees = (torch.sign(change) == sign) & (change != 0)
        total += torch.where(agrees, change, 0)
        count += agrees
    return _scaling(merge) * total / count.clamp(min=1)


def dare(changes: list[Tensor], merge: Merge, generator: torch.Generator) -> Tensor:
    """Drop values at random and scale up what is left, then add up as task arithmetic does (Yu et al. 2024)."""
    density = merge.density or 0.1
    kept = [
        torch.where(torch.rand(change.shape, generator=generator) < density, change / density, 0) for change in changes
    ]
    return task_arithmetic(kept, merge, generator)


BASELINES: dict[str, Combine] = {"soup": soup, "task-arithmetic": task_arithmetic, "ties": ties, "dare": dare}
"""`merge.method` -> function of the experts' changes, the settings and a random generator to the model's change."""


def merge_densely(base: Base, experts: list[Expert], merge: Merge, *, out: Path, seed: int = 0) -> dict[str, str]:
    """Write one dense model of the base's own kind to the folder `out`; return its shards' sha256.

    Args:
        seed: with a tensor's name it seeds what is random, so that the order of tensors doesn't matter.

    Raises:
        ExpertError: if an expert holds a value that is not finite, naming its tensor.
        WorkspaceError: if the disk has no room.
    """
    for expert in experts:
        require_keepable(expert, f"merge.method {merge.method}")
    head = joined_head(experts)
    planned = [
        Planned(
            name,
            base.weights.dtype(name),
            base.weights.shape(name),
            functools.partial(_merged, name, base, experts, merge, seed),
        )
        for name in base.weights
        if head is None or not base.is_of_head(name)
    ]
    planned += head.tensors if head is not None else []
    digests = write_checkpoint(out, [[in_type(tensor, merge.dtype) for tensor in planned]])
    config = {key: value for key, value in base.config.items() if key != "auto_map"}
    config |= head.config(base.architecture.class_prefix) if head is not None else {}
    write_json(out / "config.json", typed_config(config, merge.dtype))
    copy_companions(base, out)
    return digests


def _merged(name: str, base: Base, experts: list[Expert], merge: Merge, seed: int) -> Tensor:
    own = base.weights.read(name)
    updates = [expert.updates.get(name) for expert in experts]
    if not own.is_floating_point() or not any(updates):
        return own
    changes = [torch.zeros_like(wide(own)) if update is None else update.difference(own) for update in updates]
    generator = torch.Generator().manual_seed(int(digest([seed, name])[:12], 16))
    return (wide(own) + BASELINES[merge.method](changes, merge, generator)).to(own.dtype)


def _total(changes: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, changes)


def _scaling(merge: Merge) -> float:
    return merge.scaling if merge.scaling is not None else 1.0 if merge.method == "ties" else 0.4


def _largest(change: Tensor, density: float) -> Tensor:
    """Return the change with all but its largest values, by magnitude, set to zero."""
    kept = max(1, int(density * change.numel()))
    places = change.abs().reshape(-1).topk(kept).indices
    trimmed = torch.zeros_like(change).reshape(-1)
    trimmed[places] = change.reshape(-1)[places]
    return trimmed.reshape(change.shape)
