"""How held-out rows are judged beyond the loss: by the choice that a model makes, or by what it writes."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from mergekit_moe.spec import Spec, check_template


class Choices(Spec):
    """Several answers to each row's prompt: a model's is the one that it finds most likely."""

    choices: str | list[str]
    """Column that holds a list of texts, or a template for each choice, such as its letter. `{choice}` in `completion`
    stands for one of them where a model is judged, for the right one where the loss is taken."""
    answer: str
    """Column that tells the right choice: by its text, its number (from `first`), or its letter from A."""
    first: Literal[0, 1] = 0
    """Number of the first choice, where `answer` is a number: SocialIQA counts from 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.choices, str):
            return self
        if len(self.choices) < 2:
            raise ValueError("'choices' is a column's name, or a list of at least two templates")
        for template in self.choices:
            check_template(template)
        return self


class Generation(Spec):
    """A text to be written after each row's prompt, without sampling, and compared with the right one."""

    answer: str
    """Template for the right text."""
    extract: str | None = None
    """Regular expression for the part that is compared, such as `#### (\\S+)`: its group, or the whole match where it
    has none; the first match in the right text, and in what the model wrote. Without it all of both is compared,
    but for white space at the ends."""
    max_new_tokens: int = Field(256, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_template(self.answer)
        try:
            groups = re.compile(self.extract or "").groups
        except re.error as error:
            raise ValueError(f"'extract' is no regular expression: {error}") from None
        if groups > 1:
            raise ValueError(f"'extract' has {groups} groups; keep the one to compare, and write the others as (?:...)")
        return self


def _kind(value: Any) -> str:
    has_choices = isinstance(value, Choices) or (isinstance(value, dict) and "choices" in value)
    return "(choices)" if has_choices else "(generation)"


Task = Annotated[
    Annotated[Choices, Tag("(choices)")] | Annotated[Generation, Tag("(generation)")],
    Discriminator(_kind),
]
