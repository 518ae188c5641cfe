"""How an expert's FFNs are kept: factored where that is exact or asked for, else whole."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_moe.experts import Base, Expert, require_ffn_change
from mergekit_moe.merging.compression import Spool, low_rank
from mergekit_moe.recipe import Compression
from mergekit_moe.updates import Update
from mergekit_moe.weights import Planned, passed_through


class FfnExpert(NamedTuple):
    """An expert as the merged model holds it, but for the values of its tensors."""

    entry: dict[str, Any]
    """In the config's `experts`."""
    tensors: list[Planned]
    errors: dict[str, float] = {}
    """Weight -> relative error of its factors, where they were made by SVD."""

    @property
    def form(self) -> str:
        """What it is, in words."""
        if self.entry.get("kind") == "dense":
            return "whole FFNs"
        if not self.errors:
            return "factored, exact"
        mean, worst = sum(self.errors.values()) / len(self.errors), max(self.errors.values())
        return f"factored by SVD, relative error {mean:.3g} in the mean and {worst:.3g} at most"


def plan_expert(
    expert: Expert,
    number: int,
    base: Base,
    compress: Compression | None,
    spool: Spool,
    *,
    seed: int,
    tell: Callable[[str], None] = lambda line: None,
) -> FfnExpert:
    """Return how expert `number` is kept.

    Args:
        compress: for what isn't of low rank.
        spool: takes what is compressed.
        seed: of randomised SVD.
        tell: takes a line about what can't be compressed.

    Raises:
        ExpertError: if it changes no FFN.
    """
    require_ffn_change(expert, base)
    weights = base.ffn_weights()
    biases = [name for weight in weights if _changes(name := weight.removesuffix("weight") + "bias", base, expert)]
    updates = {name: expert.updates[name] for name in weights if name in expert.updates}
    if not biases and all(update.is_low_rank for update in updates.values()):
        return _factored(expert.name, number, base, updates)
    if compress is not None and not biases:
        return _compressed(expert.name, number, base, updates, compress, spool, seed)
    if compress is not None:
        tell(f"expert '{expert.name}': it changed {biases[0]}, and factors hold no bias: its FFNs are kept whole")
    return _whole(expert, number, base, [*weights, *(name.removesuffix("weight") + "bias" for name in weights)])


def _changes(bias: str, base: Base, expert: Expert) -> bool:
    """True if the expert's bias is another than the base's; fine-tunes hold all of them, changed or not."""
    if bias not in expert.updates:
        return False
    own = base.weights.read(bias)
    return not torch.equal(expert.updates[bias].apply(own), own)


def disk_name(weight: str, number: int, base: Base, factor: str | None = None) -> str:
    """Return where an expert's matrix lies in the merged model, from the name of the base's own."""
    module, _, kind = weight.rpartition(".")
    projection = next(name for name in base.architecture.projections if module.endswith(f".{name}"))
    part = kind if factor is None else f"lora_{factor}.{kind}"
    return f"{module.removesuffix(f'.{projection}')}.experts.{number}.{projection.replace('.', '_')}.{part}"


def _entry(name: str, scale: float, ranks: dict[str, int], base: Base) -> dict[str, Any]:
    """Return an expert's entry in the config: one rank a projection, or one a layer where they differ."""
    found: dict[str, Any] = {}
    for projection in base.architecture.projections:
        each = [ranks.get(f"{block}.{projection}.weight", 0) for block in base.blocks()]
        if any(each):
            found[projection] = each[0] if len(set(each)) == 1 else each
    return {"name": name, "scale": scale, "ranks": found}


def _factored(name: str, number: int, base: Base, updates: dict[str, Update]) -> FfnExpert:
    """Keep the factors as they are. The config has one scale: where another was meant, B carries the rest."""
    scales = Counter(update.scale for update in updates.values() if update.scale) or Counter([0.0])
    scale = scales.most_common(1)[0][0]
    tensors = []
    for weight, update in updates.items():
        assert update.lora_A is not None
        assert update.lora_B is not None
        own = update.weights
        tensors.append(passed_through(own, update.lora_A, disk_name(weight, number, base, "A")))
        planned_B = passed_through(own, update.lora_B, disk_name(weight, number, base, "B"))
        if update.scale != scale:
            # A product with the ratio fits 16 bits only by chance.
            dtype = "F64" if planned_B.dtype == "F64" else "F32"
            planned_B = planned_B._replace(dtype=dtype, make=functools.partial(_scaled, update, scale), check=None)
        tensors.append(planned_B)
    return FfnExpert(_entry(name, scale, {weight: update.rank for weight, update in updates.items()}, base), tensors)


def _scaled(update: Update, scale: float) -> Tensor:
    lora_B = update.factors()[1]
    dtype = torch.float64 if lora_B.dtype == torch.float64 else torch.float32
    return (lora_B.double() * (update.scale / scale)).to(dtype)


def _compressed(
    name: str,
    number: int,
    base: Base,
    updates: dict[str, Update],
    compress: Compression,
    spool: Spool,
    seed: int,
) -> FfnExpert:
    """Factor what the expert changed; all of it now, since only then are the ranks known."""
    tensors, errors, ranks = [], {}, {}
    for weight, update in updates.items():
        own = base.weights.read(weight)
        factors = low_rank(update.difference(own), compress, seed=seed)
        ranks[weight], errors[weight] = len(factors.lora_A), factors.error
        if not ranks[weight]:
            continue
        for factor, matrix in (("A", factors.lora_A), ("B", factors.lora_B)):
            kept = spool.add(matrix.to(own.dtype))
            tensors.append(
                Planned(disk_name(weight, number, base, factor), base.weights.dtype(weight), tuple(matrix.shape), kept)
            )
    return FfnExpert(_entry(name, 1.0, ranks, base), tensors, errors)


def _whole(expert: Expert, number: int, base: Base, names: list[str]) -> FfnExpert:
    """Keep every matrix and bias whole, those that the expert left alone included."""
    tensors = []
    for name in names:
        if name in base.weights:
            tensors.append(_own_tensor(name, disk_name(name, number, base), base, expert.updates.get(name)))
    return FfnExpert({"name": expert.name, "kind": "dense"}, tensors)


def _own_tensor(name: str, new_name: str, base: Base, update: Update | None) -> Planned:
    planned = passed_through(base.weights, name, new_name)
    if update is None:
        return planned
    if update.whole is not None and update.lora_A is None and update.weights.dtype(update.whole) == planned.dtype:
        return passed_through(update.weights, update.whole, new_name)
    return planned._replace(make=lambda: update.apply(base.weights.read(name)), check=None)
