"""A recipe's YAML file, read and checked whole."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mergekit_moe.errors import RecipeError
from mergekit_moe.recipe import Recipe


def load_recipe(path: Path, data_dir: Path | None = None) -> Recipe:
    """Read and check a recipe; `data_dir` on the command line wins over the recipe's.

    Raises:
        RecipeError: naming the file and every field that is wrong.
    """
    values = _read_yaml(path)
    experts = values.get("experts")
    for expert in experts if isinstance(experts, list) else []:
        if isinstance(expert, dict) and isinstance(expert.get("client"), str):
            expert["client"] = _read_yaml(path.parent / expert["client"])
    values["data_dir"] = str(data_dir or path.parent / str(values.get("data_dir", ".")))
    return _validated(values, str(path))


def change_recipe(recipe: Recipe, changes: dict[str, Any], what: str, *, without: Collection[str] = ()) -> Recipe:
    """Return a recipe with some of its values changed; mappings are changed key by key, experts by their names.

    Args:
        without: parts of the recipe that are left out first.

    Raises:
        RecipeError: naming `what` and every field that is wrong.
    """
    values = recipe.model_dump(mode="json", exclude_unset=True, exclude=set(without))
    experts = {expert["name"]: expert for expert in values["experts"]}
    changed = changes.get("experts")
    if isinstance(changed, dict):
        for name in changed.keys() - experts.keys():
            raise RecipeError(f"{what}.experts: there is no expert '{name}'; there are {', '.join(experts)}")
        values["experts"] = list(_changed(experts, changed).values())
        changes = {key: value for key, value in changes.items() if key != "experts"}
    return _validated(_changed(values, changes), what)


def _validated(values: dict[str, Any], what: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(in_words(error, what)) from None


def in_words(error: ValidationError, what: str) -> str:
    """Return what is wrong with `what`, a line for every field."""
    return "\n".join(f"{what}: {_sentence(e)}" for e in error.errors())


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _changed(values[key], new) if isinstance(new, dict) and isinstance(values.get(key), dict) else new
        for key, new in changes.items()
    }
    return values | both


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; give the path of a recipe") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter: no text, or a date that there isn't
        raise RecipeError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; give the path of a recipe") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a YAML mapping with base_model, experts and, mostly, public_pool")
    return values


def _sentence(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if not str(part).startswith("("))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        message = "is required"
    elif error["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, got {error['input']!r}"
    return f"{where}: {message}" if where else message
