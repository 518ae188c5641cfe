"""Model cards from the templates in `cards/`: for a client's expert, and for the unified model."""

import re
from pathlib import Path
from typing import Any

import yaml

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


def common_license(given: str | None, inputs: dict[str, str]) -> tuple[str, str]:
    """Return (licence, note): the inputs' own where all agree, the recipe's where given, else `other`."""
    if given is not None:
        return given, ""
    if len(set(inputs.values())) == 1 and "unknown" not in inputs.values():
        return next(iter(inputs.values())), ""
    listed = ", ".join(f"{name}: {license}" for name, license in inputs.items())
    return "other", f"The inputs' licences differ or are unknown ({listed}); set `card.license` in the recipe."


def public_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML without what describes private data, or where data lies on a machine."""
    values = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"data_dir"})
    values["experts"] = [
        {key: _placeless(value) for key, value in expert.items() if key not in ("client", "test")}
        for expert in values["experts"]
    ]
    if isinstance(values["base_model"], str):
        values["base_model"] = _placeless(values["base_model"])
    pools = values.get("public_pool", [])
    for pool in pools if isinstance(pools, list) else [pools]:
        pool.update({"dataset": _placeless(pool["dataset"])} if "dataset" in pool else {})
    if "embedder" in values.get("selection", {}):
        values["selection"]["embedder"] = _placeless(values["selection"]["embedder"])
    return yaml.safe_dump(values, sort_keys=False).strip()


def _placeless(source: str) -> str:
    """Return a Hub id as it is, and a path's last part without where it lies."""
    return source if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.startswith(".") else Path(source).name
