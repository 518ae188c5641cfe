"""The parts of the recipe that are for images: rows that hold one, and what doesn't go with them."""

from typing import TYPE_CHECKING

from mergekit_moe.seed_recipe import ClipSeed, Seed

if TYPE_CHECKING:
    from mergekit_moe.recipe import DataSource, Recipe

SEED_EMBEDDER = "seed"
"""In `selection.embedder`: the base model's own image tower."""


def is_of_images(recipe: "Recipe") -> bool:
    """Whether any rows of the recipe are images; then all are."""
    return any(source.image is not None for _, source in _rows(recipe))


def check_images(recipe: "Recipe") -> None:
    """Raise ValueError for a recipe of images that has other rows, too, or asks for what only text can do."""
    selection = recipe.selection
    if not is_of_images(recipe):
        if isinstance(recipe.base_model, ClipSeed):
            raise ValueError("base_model: a seed of kind clip reads images, and here rows are text; drop 'kind'")
        if selection.embedder == SEED_EMBEDDER and recipe.pool_sources:
            raise ValueError(
                "selection.embedder seed is the image tower of a base model that reads images, and public_pool's rows "
                "are text; name a model of sentence-transformers"
            )
        return
    for what, source in _rows(recipe):
        if source.image is None:
            raise ValueError(f"{what}: its rows are text, and others are images; one model reads either")
    if isinstance(recipe.base_model, Seed):
        raise ValueError(
            "base_model: this seed reads text; for images name a CLIP model, or train a small one by `kind: clip`"
        )
    if selection.embedder_backend == "openvino":
        raise ValueError("selection.embedder_backend openvino is for texts; drop it for images")
    if recipe.router.start == "cheap-embed":
        raise ValueError("router.start cheap-embed is of token embeddings, and images have none; start with lda")


def embedder_of(recipe: "Recipe") -> str:
    """Return what embeds the pool: for images, the base model's own image tower where the recipe names nothing."""
    selection = recipe.selection
    if is_of_images(recipe) and "embedder" not in selection.model_fields_set:
        return SEED_EMBEDDER
    return selection.embedder


def _rows(recipe: "Recipe") -> "list[tuple[str, DataSource]]":
    """Return all rows that a recipe names, and how an error calls them."""
    found = [("public_pool", source) for source in recipe.pool_sources]
    found += [(f"expert '{expert.name}'", source) for expert in recipe.experts for source in expert.rows]
    return found + [(f"comparison.strangers.{name}", rows) for name, rows in recipe.comparison.strangers.items()]
