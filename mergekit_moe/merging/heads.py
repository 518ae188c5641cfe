"""An image classifier's head over the labels of all experts, each of which knows only its own."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_moe.architectures import CLASSIFIER
from mergekit_moe.errors import ExpertError
from mergekit_moe.experts import Expert
from mergekit_moe.updates import wide
from mergekit_moe.weights import Planned


class Head(NamedTuple):
    """What the unified model answers."""

    labels: tuple[str, ...]
    tensors: list[Planned]

    def config(self, class_prefix: str) -> dict[str, Any]:
        """Return what it adds to a config.json, of a native class with this prefix."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        names = {"id2label": {str(number): label for label, number in numbers.items()}, "label2id": numbers}
        return {**names, "architectures": [f"{class_prefix}ForImageClassification"]}


def joined_head(experts: list[Expert]) -> Head | None:
    """Return one head with a row for each label of any expert, in the experts' order; None if none brings a head.

    A label that several bring gets the mean of their rows. The base's own labels are not among them.

    Raises:
        ExpertError: if some bring a head and others don't.
    """
    bringing = [expert for expert in experts if expert.labels]
    if not bringing:
        return None
    for expert in experts:
        if not expert.labels:
            raise ExpertError(
                f"expert '{expert.name}': it has no head of its own, and '{bringing[0].name}' has one; train one with "
                "it and name its labels, or drop it"
            )
    rows: dict[str, list[tuple[Expert, int]]] = {}
    for expert in experts:
        for row, label in enumerate(expert.labels):
            rows.setdefault(label, []).append((expert, row))
    tensors = []
    for part in CLASSIFIER:
        first = experts[0].head[part]
        assert first.whole is not None
        dtype, shape = first.weights.dtype(first.whole), first.weights.shape(first.whole)
        make = functools.partial(_stacked, part, experts, list(rows.values()))
        tensors.append(Planned(part, dtype, (len(rows), *shape[1:]), make))
    return Head(tuple(rows), tensors)


def _stacked(part: str, experts: list[Expert], rows: list[list[tuple[Expert, int]]]) -> Tensor:
    """Return the mean row of each label, in the first expert's type."""
    own = {expert.name: expert.head[part].weights.read(str(expert.head[part].whole)) for expert in experts}
    means = [torch.stack([wide(own[expert.name][row]) for expert, row in group]).mean(0) for group in rows]
    return torch.stack(means).to(own[experts[0].name].dtype)
