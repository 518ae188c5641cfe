"""A recipe's YAML file, read and checked whole."""

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
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{path}: {_sentence(e)}" for e in error.errors())) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; give the path of a recipe") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
