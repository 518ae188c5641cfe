"""Model cards from the templates in `cards/`: for a client's expert, and for the unified model."""

import re
from pathlib import Path
from typing import Any

import yaml

from mergekit_moe.errors import RecipeError
from mergekit_moe.recipe import Recipe

_PACKAGE = Path(__file__).parent
# In a wheel the templates lie inside the package, in a checkout beside it.
_TEMPLATES = (_PACKAGE / "card_templates", _PACKAGE.parent / "cards")


def render(template: str, **values: Any) -> str:
    """Return the text of a card."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template(template).render(**values)


def common_license(given: str | None, inputs: dict[str, str]) -> str | None:
    """Return what the recipe says, else the inputs' own licence where all agree; None if nothing can be said."""
    if given is not None:
        return given
    (first, *others) = set(inputs.values()) or {"unknown"}
    return None if others or first == "unknown" else first


def require_license(given: str | None, inputs: dict[str, str]) -> str:
    """Return the unified model's licence.

    Raises:
        RecipeError: if the inputs' licences differ or one is unknown, until the recipe says what the result's is.
    """
    license = common_license(given, inputs)
    if license is None:
        listed = ", ".join(f"{name} {license}" for name, license in inputs.items())
        raise RecipeError(
            f"card.license: the inputs' licences differ or are unknown ({listed}), and no file can tell what that "
            "makes of the unified model's; set card.license in the recipe"
        )
    return license


def model_metadata(
    *,
    library: str,
    license: str,
    base_models: list[str],
    relation: str,
    datasets: list[str],
    tags: list[str],
    language: list[str] | None = None,
    name: str | None = None,
    losses: dict[str, dict[str, float]] | None = None,
    task: str = "text-generation",
) -> str:
    """Return a model card's metadata, as the Hub reads it, in YAML.

    Args:
        base_models: Hub ids; with none there is no relation either.
        relation: the Hub's word for what the model is of its base: adapter, finetune or merge.
        losses: domain -> metric's name -> value, for the model index; needs `name`.
        task: the Hub's word for what the model is for.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(task, dataset_type=domain, dataset_name=domain, metric_type=metric, metric_value=value)
        for domain, values in (losses or {}).items()
        for metric, value in values.items()
    ]
    related: dict[str, Any] = {"base_model": base_models, "base_model_relation": relation} if base_models else {}
    return ModelCardData(
        library_name=library,
        license=license,
        pipeline_tag=task,
        datasets=datasets or None,
        language=language or None,
        tags=tags,
        model_name=name if results else None,
        eval_results=results or None,
        **related,
    ).to_yaml()


def dataset_metadata(*, license: str, rows: int, sources: list[str], file: str) -> str:
    """Return a data set card's metadata, in YAML.

    Args:
        sources: Hub ids of the data sets that the rows come from.
        file: holds the rows.
    """
    from huggingface_hub import DatasetCardData

    sizes = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K"}
    size = next((name for limit, name in sizes.items() if rows < limit), "100K<n<1M")
    return DatasetCardData(
        license=license,
        size_categories=[size],
        source_datasets=sources or None,
        tags=["mergekit_moe", "proxies"],
        configs=[{"config_name": "default", "data_files": file}],
    ).to_yaml()


def public_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML without what describes private data, or where data lies on a machine."""
    values = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"data_dir"})
    for expert in values["experts"]:
        for private in ("client", "test"):
            expert.pop(private, None)
        if "source" in expert:
            expert["source"] = placeless(expert["source"])
    if isinstance(values["base_model"], str):
        values["base_model"] = placeless(values["base_model"])
    pools = values.get("public_pool", [])
    for pool in pools if isinstance(pools, list) else [pools]:
        pool.update({"dataset": placeless(pool["dataset"])} if "dataset" in pool else {})
    if "embedder" in values.get("selection", {}):
        values["selection"]["embedder"] = placeless(values["selection"]["embedder"])
    return yaml.safe_dump(values, sort_keys=False).strip()


def placeless(source: str) -> str:
    """Return a Hub id as it is, and a path's last part without where it lies."""
    return source if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.startswith(".") else Path(source).name
