"""The part of the recipe that says where rows come from."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mergekit_moe.spec import Spec, check_template

InstalledText = Literal["library-source", "manual", "unicode-names", "licences"]
InstalledImages = Literal["digits", "glyphs", "photographs"]


class DataSource(Spec):
    """Rows of text, and the templates that turn a row into a training example; or rows of images."""

    dataset: str | None = None
    """A .jsonl, .json, .csv, .parquet or .txt file (.gz too), a folder, or a Hub data set's id."""
    installed: InstalledText | InstalledImages | None = None
    """Text that every Python installation carries, or images that packages do, in place of `dataset`."""
    revision: str | None = None
    """Commit, tag or branch of a Hub data set; pinned to the commit when it is read."""
    split: str = "train"
    where: dict[str, str | int | list[str | int]] = {}
    """Keep the rows whose column has this value, or one of these values."""
    text: str | None = None
    """Template for plain text, such as `{text}`; every token of it is learnt."""
    prompt: str | None = None
    """Template for what is given; its tokens are masked in every loss."""
    completion: str | None = None
    """Template for what is learnt; required with `prompt`."""
    label: str | None = None
    """Template for what the text or image is one of, such as `{intent}` or `a photo of a {breed}`; underscores are
    shown as spaces, a class by its name. With `text` or `image` only, and for an encoder: it learns to put a text or
    image nearest to the name of its label. Where the pool's rows have labels, every expert learns to tell its own from
    those, too; only the clients' own are what models are judged by."""
    image: str | None = None
    """Column that holds an image, in place of a text: a PNG or JPEG file's bytes, or as `datasets` keeps images."""
    chunk: int | None = Field(None, ge=50)
    """Characters. Longer texts are split at line ends into rows of at most this size (plain text only)."""
    id: str = "id"
    """Column that names a row; the row's number where there is no such column."""
    tag: str | None = None
    """Column with a row's true domain, where one is known: only ever used to judge the selector."""
    limit: int | None = Field(None, ge=1)
    """Keep the first so many rows (after `where`)."""
    license: str | None = None
    """Licence of the rows, for the cards of what is made from public ones."""
    streaming: bool = False
    """Read a Hub data set row by row until `limit`, rather than download all of it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.dataset is None) == (self.installed is None):
            raise ValueError("give either 'dataset' or 'installed'")
        _check_content(self)
        if self.streaming and self.limit is None:
            raise ValueError("'streaming' needs a 'limit', the number of rows to read")
        for template in (self.text, self.prompt, self.completion, self.label):
            check_template(template or "")
        return self


def _check_content(source: DataSource) -> None:
    """Raise ValueError unless a source says once what its rows are: a text, a prompt and a completion, or an image."""
    if source.image is not None:
        for field in ("text", "prompt", "completion", "chunk"):
            if getattr(source, field) is not None:
                raise ValueError(f"'image' names the column that holds an image, and '{field}' is of text; drop one")
        return
    if source.text is None and source.completion is None:
        raise ValueError(
            "give 'text', or 'prompt' and 'completion', as templates such as '{text}'; or 'image', the column of images"
        )
    if source.text is not None and (source.prompt is not None or source.completion is not None):
        raise ValueError("give either 'text' or 'prompt' and 'completion', not both")
    if source.label is not None and source.text is None:
        raise ValueError("'label' is what a 'text' is one of; drop it, or give 'text' instead of prompt and completion")
    if source.chunk is not None and source.text is None:
        raise ValueError("'chunk' splits plain text only; drop it, or use 'text'")
