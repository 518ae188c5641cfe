"""What experts changed outside their FFNs, of which one model holds a single copy: found, told, and dealt with."""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from mergekit_moe.errors import ExpertError
from mergekit_moe.experts import Base, Expert, require_keepable
from mergekit_moe.updates import squared_distance, wide
from mergekit_moe.weights import Planned, chunks, passed_through


class Difference(NamedTuple):
    """What an expert changed in one kind of module, all layers together."""

    module: str
    """Name of the tensors, with `*` for the layer's number."""
    tensors: int
    parameters: int
    relative: float
    """Norm of the change over the base's own norm."""

    def __str__(self) -> str:
        count = f"{self.tensors} tensors" if self.tensors > 1 else "1 tensor"
        return f"{self.module} ({count}, {self.parameters:,} weights, {self.relative:.2g} of the base's norm)"


def find_differences(base: Base, experts: list[Expert]) -> dict[str, list[Difference]]:
    """Return expert's name -> what it changed outside the FFNs; reads those tensors, and nothing else."""
    norms: dict[str, float] = {}
    return {expert.name: _differences(base, expert, norms) for expert in experts}


def _differences(base: Base, expert: Expert, norms: dict[str, float]) -> list[Difference]:
    groups: dict[str, list[tuple[str, float]]] = {}
    for name, update in expert.updates.items():
        if not base.is_ffn(name):
            change = update.squared_norm(base.weights.view(name))
            if not math.isfinite(change):
                update.exact(base.weights.read(name))  # says whose tensor it is that holds NaN or infinity
            if change > 0.0:
                groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append((name, change))
    found = []
    for module, changes in groups.items():
        for name, _ in changes:
            if name not in norms:
                norms[name] = squared_distance(base.weights.view(name))
        parameters = sum(math.prod(base.weights.shape(name)) for name, _ in changes)
        norm = sum(norms[name] for name, _ in changes)
        relative = (sum(change for _, change in changes) / norm) ** 0.5 if norm else float("inf")
        found.append(Difference(module, len(changes), parameters, relative))
    return found


def tell_differences(
    experts: list[Expert], differences: dict[str, list[Difference]], policy: str, tell: Callable[[str], None]
) -> None:
    """Say what becomes of every change outside the FFNs, before anything is written.

    Raises:
        ExpertError: if the policy is to refuse, and there is one.
    """
    for expert in experts:
        if policy != "base":
            require_keepable(expert, f"merge.other_weights {policy}")
        if expert.untied:
            tell(f"expert '{expert.name}': {', '.join(expert.untied)}, which the base ties to its embedding, left out")
    lines = [(name, ", ".join(str(difference) for difference in found)) for name, found in differences.items() if found]
    if policy == "refuse" and lines:
        raise ExpertError(
            "\n".join(
                f"expert '{name}': it changed weights outside the FFNs, and merge.other_weights is refuse: {what}; "
                "choose base to leave them out or average to take their mean, or drop the expert"
                for name, what in lines
            )
        )
    fate = {"base": "left out", "average": "taken into the mean over all experts"}
    for name, what in lines:
        tell(f"expert '{name}': changes outside the FFNs, {fate[policy]}: {what}")


def planned_shared(name: str, base: Base, experts: list[Expert], policy: str) -> Planned:
    """Return how a tensor that all experts share is made: the base's own, or outside the FFNs the mean over them.

    The base's FFN is no mean: experts that are kept as factors are what they add to it.
    """
    weights = base.weights
    if policy != "average" or base.is_ffn(name) or not any(name in expert.updates for expert in experts):
        return passed_through(weights, name)
    return Planned(name, weights.dtype(name), weights.shape(name), functools.partial(_mean, name, base, experts))


def _mean(name: str, base: Base, experts: list[Expert]) -> Tensor:
    """Return base + sum of the experts' changes / their number; who changed nothing counts with the base's own."""
    own = base.weights.read(name)
    total = wide(own).clone()
    for expert in experts:
        if name in expert.updates:
            exact = expert.updates[name].exact(own)
            for into, theirs, ours in zip(chunks(total), chunks(exact), chunks(own), strict=True):
                into.add_(theirs.to(into.dtype) - ours, alpha=1.0 / len(experts))
    return total.to(own.dtype)
