"""Between disk and memory: one pair of LoRA matrices an expert there, one of all experts' ranks here.

Shipped inside every checkpoint, so it imports nothing but torch and transformers.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from .experts_metamoe import FORMS


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
        found = {}
        first = 0
        for number, expert in enumerate(model.config.experts):
            rank = {name.replace(".", "_"): rank for name, rank in expert["ranks"].items()}.get(projection, 0)
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


def register_disk_layout(model_type: str) -> None:
    """Teach transformers' loading and saving how this family's experts lie on disk."""
    projections = sorted({name.replace(".", "_") for form in FORMS for name in form.projections})
    converters = [
        WeightConverter(f"experts.*.{name}.lora_{factor}.weight", f"experts.{name}.lora_{factor}", [SideBySide(turned)])
        for name in projections
        for factor, turned in (("A", False), ("B", True))
    ]
    register_checkpoint_conversion_mapping(model_type, converters, overwrite=True)
