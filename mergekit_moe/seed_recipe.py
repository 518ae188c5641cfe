"""The parts of the recipe that are for seeds which are trained here: for benchmarks and demonstrations."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mergekit_moe.router_recipe import Training
from mergekit_moe.source_recipe import DataSource


class Seed(Training):
    """A small Llama and its tokenizer, trained on the public pool alone: for benchmarks and demonstrations."""

    vocab_size: int = Field(2048, ge=300)
    hidden_size: int = Field(128, ge=16)
    intermediate_size: int = 384
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    max_length: int = Field(256, ge=16)
    """Tokens; longer rows are cut."""
    license: str = "other"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2 * heads = {2 * self.heads}")
        return self


class ClipSeed(Training):
    """A small CLIP model, its tokenizer and image processor, trained to find the names of labelled public images."""

    kind: Literal["clip"]
    rows: list[DataSource] = Field(min_length=1)
    """Images with a `label`, none of a client's. Names of them are all that the tokenizer is trained on."""
    vocab_size: int = Field(1024, ge=300)
    image_size: int = Field(32, ge=8)
    """Pixels a side that every image is resized to."""
    patch_size: int = Field(8, ge=1)
    """Pixels a side."""
    hidden_size: int = Field(96, ge=16)
    """Of both towers, and of the space that they share."""
    intermediate_size: int = 384
    layers: int = Field(4, ge=1)
    """Of the image tower."""
    text_layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    max_length: int = Field(32, ge=8)
    """Tokens of a name; longer ones are cut."""
    license: str = "other"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of heads = {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size = {self.patch_size}")
        if any(source.image is None or source.label is None for source in self.rows):
            raise ValueError("rows: give 'image', and the 'label' that says what it shows, to all of them")
        return self


TrainedSeed = Seed | ClipSeed


def kind_of_base(value: Any) -> str:
    """Return which of a base model's kinds a recipe means: the tag of its class."""
    if isinstance(value, ClipSeed) or (isinstance(value, dict) and "kind" in value):
        return "(clip)"
    return "(seed)" if isinstance(value, dict | Seed) else "(name)"
