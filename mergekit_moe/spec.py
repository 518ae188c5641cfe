"""What every part of a recipe is."""

import difflib
import re
import string
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Spec(BaseModel):
    """A part of the recipe: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                    hint = f"did you mean '{near[0]}'?" if near else f"allowed are {', '.join(cls.model_fields)}"
                    raise ValueError(f"unknown key '{key}'; {hint}")
        return values


def check_template(template: str) -> None:
    """Raise ValueError unless the template is text with column names in braces, a path's with the number of a part."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; double a brace that is meant as such") from None
    for _, name, form, conversion in fields:
        if name is not None and (conversion or not re.fullmatch(r"[\w ./-]+:\d*", f"{name}:{form}")):
            raise ValueError(
                f"template {template!r}: a brace holds a column's name and nothing else, such as {{text}}; "
                "or a path's and the number of one of its parts, from 0, such as {path:1}"
            )
