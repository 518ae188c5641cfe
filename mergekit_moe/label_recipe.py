"""The parts of the recipe that are for encoders: rows with labels, and how texts or images are matched with them."""

from typing import TYPE_CHECKING

from pydantic import Field

from mergekit_moe.seed_recipe import Seed
from mergekit_moe.spec import Spec

if TYPE_CHECKING:
    from mergekit_moe.recipe import Recipe


class Matching(Spec):
    """How an encoder says which label a text or image has: by the cosine to each name, which the seed embeds."""

    temperature: float = Field(0.05, gt=0)
    """Cosines are divided by it; of the loss that experts learn by, and of the probabilities that are judged."""


def check_labels(recipe: "Recipe") -> None:
    """Raise ValueError unless all experts' rows have labels, or none; the pool's have some only where those have."""
    if not recipe.matches_labels:
        rows = [source for expert in recipe.experts for source in expert.rows]
        if rows and any(source.label is not None for source in recipe.pool_sources):
            raise ValueError("public_pool: its 'label' is learnt beside those of clients, which have none; drop it")
        return
    for expert in recipe.experts:
        if any(source.label is None for source in expert.rows):
            raise ValueError(
                f"expert '{expert.name}': it has rows without 'label', and others have one; give it to all, or to none"
            )
    if isinstance(recipe.base_model, Seed):
        raise ValueError("base_model: a seed that is trained here is no encoder, and 'label' needs one")
    if recipe.comparison.strangers:
        raise ValueError("comparison.strangers: rows of no expert's domain have none of their labels; drop it")
