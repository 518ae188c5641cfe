"""Between disk and memory: one matrix an expert and projection there, all experts' fused here.

Shipped inside every checkpoint, so it imports nothing but torch and transformers.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import ConversionOps, WeightConverter

from .experts_metamoe import FeedForward


class SideBySide(ConversionOps):
    """Lay the experts' matrices of one projection side by side along the rank; B transposed, so along rows."""

    def __init__(self, transposed: bool) -> None:
        self.transposed = transposed

    @torch.no_grad
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        (matrices,) = input_dict.values()  # in the order of the experts' numbers
        return {target_patterns[0]: torch.cat([m.T if self.transposed else m for m in matrices])}

    @property
    def reverse_op(self) -> ConversionOps:
        return OnePerExpert(self.transposed)


class OnePerExpert(ConversionOps):
    """The reverse: cut by the ranks that the config names."""

    def __init__(self, transposed: bool) -> None:
        self.transposed = transposed

    @torch.no_grad
    def convert(self, input_dict: dict[str, Any], full_layer_name: str, model: Any, **kwargs: Any) -> dict[str, Tensor]:
        ((pattern, given),) = input_dict.items()
        matrix = given[0] if isinstance(given, list) else given
        projection = pattern.split(".")[1]
        block = full_layer_name.partition(".experts.*.")[0]
        found = {}
        first = 0
        for number, rank in enumerate(model.get_submodule(block).experts[projection].ranks):
            if rank:
                part = matrix[first : first + rank]
                # Whole names: the library would work out a prefix only if expert 0 were among them.
                name = full_layer_name.replace(".experts.*.", f".experts.{number}.")
                found[name] = (part.T if self.transposed else part).contiguous()
                first += rank
        return found

    @property
    def reverse_op(self) -> ConversionOps:
        return SideBySide(self.transposed)


class Stack(ConversionOps):
    """Stack dense experts; where gate and up lie apart on disk, the gate comes first."""

    @torch.no_grad
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        parts = [input_dict[pattern] for pattern in source_patterns if pattern in input_dict]
        return {target_patterns[0]: torch.stack([torch.cat(expert) for expert in zip(*parts, strict=True)])}

    @property
    def reverse_op(self) -> ConversionOps:
        return Unstack()


class Unstack(ConversionOps):
    """The reverse, under the names that the family's own FFN has."""

    @torch.no_grad
    def convert(self, input_dict: dict[str, Any], full_layer_name: str, model: Any, **kwargs: Any) -> dict[str, Tensor]:
        ((pattern, given),) = input_dict.items()
        fused = given[0] if isinstance(given, list) else given
        block, _, rest = full_layer_name.partition(".experts.*.")
        form = model.get_submodule(block).form
        names = (form.output,) if ".down_proj" in pattern else form.inputs
        kind = rest.rpartition(".")[2]
        return {
            f"{block}.experts.{number}.{name.replace('.', '_')}.{kind}": part.contiguous()
            for number, expert in zip(model.config.dense_experts, fused, strict=True)
            for name, part in zip(names, expert.chunk(len(names)), strict=True)
        }

    @property
    def reverse_op(self) -> ConversionOps:
        return Stack()


_BIASED: set[str] = set()


def register_disk_layout(model_type: str, form: FeedForward, biased: bool) -> None:
    """Teach transformers' loading and saving how a family's experts lie on disk.

    Called by every model that is built, so what one model of a family needs stays known for the others.
    """
    if biased:
        _BIASED.add(model_type)
    inputs = [name.replace(".", "_") for name in form.inputs]
    output = form.output.replace(".", "_")
    converters = [
        WeightConverter(f"experts.*.{name}.lora_{factor}.weight", f"experts.{name}.lora_{factor}", [SideBySide(turned)])
        for name in (*inputs, output)
        for factor, turned in (("A", False), ("B", True))
    ]
    kinds = [("weight", "")] + ([("bias", "_bias")] if model_type in _BIASED else [])
    for target, names in (("gate_up_proj" if form.gated else "up_proj", inputs), ("down_proj", [output])):
        for kind, suffix in kinds:
            sources = [f"experts.*.{name}.{kind}" for name in names]
            converters.append(WeightConverter(sources, f"experts.dense.{target}{suffix}", [Stack()]))
    register_checkpoint_conversion_mapping(model_type, converters, overwrite=True)


def register_head_names(model: Any) -> None:
    """Have a model with a head read its base's checkpoints as the native class does, where that renames tensors."""
    for native in type(model).__mro__[1:]:
        renamings = get_checkpoint_conversion_mapping(native.__name__)
        if renamings is not None:
            converters = get_checkpoint_conversion_mapping(model.config.model_type)
            register_checkpoint_conversion_mapping(type(model).__name__, [*renamings, *converters], overwrite=True)
            return
