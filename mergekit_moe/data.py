"""Rows of text or images from files, folders, the Hub or the Python installation, and what models read of them."""

import functools
import hashlib
import itertools
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from mergekit_moe import __version__, hub, installed_images, installed_text
from mergekit_moe.errors import DataError
from mergekit_moe.images import IMAGE, ImageReader, has_images, image_cell, undecoded
from mergekit_moe.recipe import DataSource
from mergekit_moe.task_recipe import Choices
from mergekit_moe.tasks import CHOICE, TASK_COLUMNS, columns_asked, task_cells, task_features, task_of
from mergekit_moe.templates import chunks, parts, render
from mergekit_moe.workspace import digest, sha256_once

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_PIECE = " [piece] "
"""Between a text's id and a chunk's number: nothing that an id of its own would hold."""
_RENDERING = 2
"""Of how templates become text: to be raised with any change to it, so that no cached pool outlives it."""
_COLUMNS = ("id", "prompt", "completion", "tag", "label")
_CORPORA: dict[str, Callable[[], Iterator[Any]]] = {**installed_text.CORPORA, **installed_images.CORPORA}
IGNORED = -100
"""Label of a token that no loss counts."""


def load_rows(
    sources: Sequence[DataSource],
    data_dir: Path,
    what: str,
    *,
    public: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> "Dataset":
    """Return the rows of all sources as columns `id`, `prompt`, `completion`, `tag`, `label`, and those of a task.

    Where there is no tag or label it is "". Rows of images have a column `image`, too, and no text.

    For choices these are `completions`, one a choice, and `right`, the number of the right one; where an answer is to
    be written, `answer`.

    Args:
        what: how an error names these rows, such as "the public pool" or "expert 'law'".
        public: True for rows that may lie in the user's `datasets` cache: memory-mapped, they need not fit into memory
            and are made once. Others are kept in memory and leave no copy.
        tell: is given a sentence about each source of which rows are left out for want of text, or of an image.

    Raises:
        DataError: if a source is missing, has no usable row, or lacks a column that a template names.
    """
    from datasets import Dataset, Features, Image, Value

    columns = Features({name: Value("string") for name in _COLUMNS})
    for source in sources:
        columns |= task_features(source) if source.image is None else {IMAGE: Image()}
    rows = itertools.chain.from_iterable(_told(source, data_dir, what, public, tell) for source in sources)
    if not public:
        return Dataset.from_list(list(rows), features=columns)
    made_from = [
        fingerprint(sources, data_dir, what),
        [[source.tag, source.streaming] for source in sources],
        [__version__, _RENDERING],
    ]
    return _on_disk(rows, columns, digest(made_from))


def _told(
    source: DataSource, data_dir: Path, what: str, public: bool, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Yield a source's rows that have text, or an image; say how many have none."""
    taken, empty = 0, 0
    wanted, called = ("completion", "text") if source.image is None else (IMAGE, "an image")
    for row in _rows_of(source, data_dir, what, public):
        if row[wanted]:
            taken += 1
            yield row
        else:
            empty += 1
    if not taken:
        raise DataError(
            f"{what}: {_name(source)} has no row with {called} in it; check 'where', 'split' and the templates"
        )
    if empty:
        missing = "text" if source.image is None else "image"
        tell(f"note: {what}: {empty:,} rows of {_name(source)} have no {missing} and are left out")


def _on_disk(rows: Iterator[dict[str, Any]], columns: Any, name: str) -> "Dataset":
    """Return the rows from a file in the `datasets` cache, which is written first unless it is there."""
    from datasets import Dataset, config
    from datasets.arrow_writer import ArrowWriter

    file = Path(config.HF_DATASETS_CACHE) / "mergekit_moe" / f"{name}.arrow"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        try:
            with ArrowWriter(path=str(partial), features=columns) as writer:
                for row in rows:
                    writer.write(row)
                writer.finalize()
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    return Dataset.from_file(str(file))


def fingerprint(
    sources: Sequence[DataSource], data_dir: Path, what: str, *, tell: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """Return what identifies the rows, wherever they lie: content (sha256 or Hub commit), filters and templates.

    Args:
        tell: is given a sentence if the cache has to do for the Hub.
    """
    return [{**_identity(source), "content": _content(source, data_dir, what, tell)} for source in sources]


def _identity(source: DataSource) -> dict[str, Any]:
    """Return what a source says of its rows, but for where they lie."""
    elsewhere = {"dataset", "installed", "revision", "tag", "license"}
    if not isinstance(task_of(source), Choices):  # which alone, of tasks, change a row's text
        elsewhere.add("task")
    elsewhere |= {field for field in ("label", "image") if getattr(source, field) is None}
    return source.model_dump(mode="json", exclude=elsewhere)


def describe(source: DataSource, data_dir: Path, what: str) -> str:
    """Return a source's public name: a Hub id with its commit, a file's name without its folders."""
    if source.installed is not None:
        return f"installed:{source.installed}"
    path = data_dir / str(source.dataset)
    return path.name if path.exists() else hub.resolve_dataset(str(source.dataset), source.revision, what)


def split_held_out(rows: "Dataset") -> tuple["Dataset", "Dataset"]:
    """Return (rows to learn from, rows held out): every tenth row by the hash of its id.

    The chunks of one text stay together.
    """
    held_out = [int(digest(row_id.split(_PIECE)[0])[:8], 16) % 10 == 0 for row_id in rows["id"]]
    learnt = rows.select([i for i, out in enumerate(held_out) if not out])
    return learnt, rows.select([i for i, out in enumerate(held_out) if out])


def without_task(rows: "Dataset") -> "Dataset":
    """Return the rows without what their task asks: learnt is their completion."""
    return rows.remove_columns([name for name in rows.column_names if name in TASK_COLUMNS])


def texts_of(rows: "Dataset") -> list[Any]:
    """Return what an embedder reads: prompt and completion as one text, or an image file's bytes."""
    if has_images(rows):
        return [cell["bytes"] for cell in undecoded(rows, IMAGE)[IMAGE]]
    return [prompt + completion for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True)]


def label_names(*parts: "Dataset") -> list[str]:
    """Return every label that any of these rows has, sorted."""
    return sorted({label for rows in parts for label in rows["label"]} - {""})


class Texts(Sequence[Any]):
    """`texts_of`, read from the rows when asked for: a pool need not fit into memory."""

    def __init__(self, rows: "Dataset") -> None:
        self.rows = rows.select_columns([IMAGE] if has_images(rows) else ["prompt", "completion"])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, int):
            return self[index : index + 1][0]
        return texts_of(self.rows.select(range(*index.indices(len(self)))))


def is_encoders(tokenizer: Any) -> bool:
    """Whether a tokenizer frames a whole text, as text encoders' do: CLS before it and SEP after it.

    By what it does: a decoder's may name such tokens and use neither.
    """
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def leading_tokens(reader: Any) -> list[int]:
    """Return [BOS] if a tokenizer puts BOS before a text of its own accord, else []; CLS sees the whole text."""
    if isinstance(reader, ImageReader) or is_encoders(reader):
        return []
    ids = reader("a")["input_ids"]
    return ids[:1] if reader.bos_token_id is not None and ids[0] == reader.bos_token_id else []


def tokenize(rows: "Dataset", reader: Any, max_length: int, names: Sequence[str] = ()) -> "Dataset":
    """Return columns `input_ids` and `labels`: BOS, prompt (masked), completion, EOS (learnt).

    BOS only where the tokenizer itself puts one, so that users' own inputs look like the training's.
    Rows are cut at `max_length` tokens; a row with nothing left to learn is dropped. Other columns stay.

    An encoder's rows are framed as its tokenizer does, and `labels` is one number a row: of its label. Rows of images
    have `pixel_values` in place of `input_ids`, made when a row is read.

    Args:
        reader: the model's tokenizer or ImageReader, from `models.load_reader`.
        names: an encoder's labels, in the order of their numbers; a row with none of them has the number IGNORED.
    """
    if isinstance(reader, ImageReader):
        return _read_images(rows, reader, names)
    if is_encoders(reader):
        return _tokenize_whole(rows, reader, max_length, names)
    bos = leading_tokens(reader)
    eos = [] if reader.eos_token_id is None else [reader.eos_token_id]

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = bos + reader(row["prompt"], add_special_tokens=False)["input_ids"]
        completion = reader(row["completion"], add_special_tokens=False)["input_ids"] + eos
        labels = [IGNORED] * len(prompt) + completion
        return {"input_ids": (prompt + completion)[:max_length], "labels": labels[:max_length]}

    encoded = rows.map(encode, remove_columns=_own_columns(rows), keep_in_memory=True)
    return encoded.filter(lambda row: any(label != IGNORED for label in row["labels"][1:]), keep_in_memory=True)


def _tokenize_whole(rows: "Dataset", tokenizer: Any, max_length: int, names: Sequence[str]) -> "Dataset":
    number = {name: i for i, name in enumerate(names)}

    def encode(row: dict[str, str]) -> dict[str, Any]:
        ids = tokenizer(row["prompt"] + row["completion"], truncation=True, max_length=max_length)["input_ids"]
        return {"input_ids": ids, "labels": number.get(row.get("label", ""), IGNORED)}

    return rows.map(encode, remove_columns=_own_columns(rows), keep_in_memory=True)


def _read_images(rows: "Dataset", reader: ImageReader, names: Sequence[str]) -> "Dataset":
    number = {name: i for i, name in enumerate(names)}
    labels = [number.get(label, IGNORED) for label in rows["label"]]
    # In memory, as rows of tokens are: they are few, and still a file's bytes each.
    return reader.read(
        rows.remove_columns(_own_columns(rows)).flatten_indices(keep_in_memory=True).add_column("labels", labels)
    )


def _own_columns(rows: "Dataset") -> list[str]:
    return [name for name in rows.column_names if name in (*_COLUMNS, *TASK_COLUMNS)]


def to_learn(labels: "torch.Tensor") -> "torch.Tensor":
    """Return which predictions are learnt: (B, T - 1) bool, of the next tokens; of an encoder all its rows, (B,)."""
    return labels[:, 1:] != IGNORED if labels.ndim == 2 else labels.new_ones(labels.shape).bool()


def collate(rows: list[dict[str, Any]]) -> dict[str, "torch.Tensor"]:
    """Return a right-padded batch of int64 tensors, (B, T); other columns, and labels of whole rows, are stacked."""
    import numpy as np
    import torch

    length = max(len(row.get("input_ids", [])) for row in rows)

    def padded(values: Iterable[list[int]], fill: int) -> "torch.Tensor":
        return torch.tensor([v + [fill] * (length - len(v)) for v in values])

    batch: dict[str, torch.Tensor] = {}
    if "input_ids" in rows[0]:
        # Padding is masked in attention and labels, so that its id is free: not every model has a pad token.
        batch["input_ids"] = padded((row["input_ids"] for row in rows), 0)
        batch["attention_mask"] = padded(([1] * len(row["input_ids"]) for row in rows), 0)
    for name in rows[0].keys() - batch.keys():
        values = [row[name] for row in rows]
        by_token = name == "labels" and isinstance(values[0], list)
        stacked = np.stack(values) if isinstance(values[0], np.ndarray) else values
        batch[name] = padded(values, IGNORED) if by_token else torch.tensor(stacked)
    return batch


def read_in(batch: "dict[str, torch.Tensor]") -> int:
    """Return how many tokens a collated batch holds for a model to read, or images."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else len(batch["pixel_values"])


def batches(
    rows: "Dataset", batch_size: int, device: Any, places: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield collated batches on `device`, of all rows in their order or of those at `places`."""
    places = range(len(rows)) if places is None else places
    for first in range(0, len(places), batch_size):
        batch = collate([rows[i] for i in places[first : first + batch_size]])
        yield {key: value.to(device) for key, value in batch.items()}


def _rows_of(source: DataSource, data_dir: Path, what: str, public: bool) -> Iterator[dict[str, Any]]:
    """Yield a source's rows, those without text as one with an empty completion."""
    raw = _load(source, data_dir, what, public)
    asked, templates = columns_asked(source)
    for column in [*source.where, *(name for name in (source.tag, source.image) if name), *asked]:
        _require_column(column, raw.column_names, source, what)
    known = raw.column_names + ([CHOICE] if "right" in task_features(source) else [])
    for template in (source.text, source.prompt, source.completion, source.label, *templates):
        for piece in parts(template or ""):
            if piece.column is not None:
                _require_column(piece.column, known, source, what)
    classes = _class_names(raw)
    if source.image is not None:
        raw = undecoded(raw, source.image)
    taken = 0
    for number, row in enumerate(raw):
        if not _matches(row, source):
            continue
        if source.limit is not None and taken == source.limit:
            return
        taken += 1
        try:
            yield from _rows_from(source, row, classes, number)
        except (TypeError, ValueError) as error:
            raise DataError(f"{what}: {_name(source)}, row {number}: {error}") from None


def _rows_from(
    source: DataSource, row: dict[str, Any], classes: dict[str, list[str]], number: int
) -> Iterator[dict[str, Any]]:
    """Yield what one row of a source becomes: a row, or one for each chunk of its text.

    Raises:
        TypeError: if a cell can't be shown in a template.
        ValueError: if something that a row needs is missing or broken.
    """
    name = str(row.get(source.id, number))
    shared = {"tag": str(row[source.tag]) if source.tag else "", "label": _label(source, row, classes)}
    if source.image is not None:
        yield {"id": name, "prompt": "", "completion": "", **shared, IMAGE: image_cell(row[source.image], source.image)}
        return
    cells = task_cells(source, row, render)
    prompt = render(source.prompt or "", row)
    row |= {CHOICE: cells[CHOICE]} if CHOICE in cells else {}
    pieces = chunks(render(source.text or source.completion or "", row), source.chunk)
    for k, piece in enumerate(pieces or [""]):
        row_id = name if len(pieces) <= 1 else f"{name}{_PIECE}{k}"
        yield {"id": row_id, "prompt": prompt, "completion": piece, **shared} | {
            name: cells[name] for name in TASK_COLUMNS if name in cells
        }


def _class_names(raw: "Dataset | IterableDataset") -> dict[str, list[str]]:
    """Return the names of the classes of columns that hold their numbers."""
    return {name: kind.names for name, kind in (raw.features or {}).items() if hasattr(kind, "names")}


def _label(source: DataSource, row: dict[str, Any], classes: dict[str, list[str]]) -> str:
    """Return what a row's text or image is one of, as it is shown; "" where rows have no label.

    Raises:
        ValueError: if this row alone has none: nothing could be learnt from it, nor judged by it.
    """
    shown = {
        name: names[row[name]] if row[name] is not None and 0 <= row[name] < len(names) else ""
        for name, names in classes.items()
    }
    label = render(source.label or "", {**row, **shown}).replace("_", " ")
    if source.label is not None and not label.strip():
        raise ValueError(f"the label {source.label} is empty; fill it in, or leave such rows out by 'where'")
    return label


def _load(source: DataSource, data_dir: Path, what: str, public: bool) -> "Dataset | IterableDataset":
    from datasets import Dataset, config, load_dataset
    from datasets.exceptions import DatasetsError

    if source.installed is not None:
        return Dataset.from_list(list(_CORPORA[source.installed]()))
    path = data_dir / str(source.dataset)
    if not path.exists():
        return hub.load_hub_dataset(
            str(source.dataset), source.revision, source.split, what, streaming=source.streaming, public=public
        )
    given: dict[str, Any] = {"path": str(path), "split": source.split}
    if path.is_file():
        given = {"path": _builder(path, what), "data_files": [str(path)], "split": "train"}
    try:
        if public:  # by content: `datasets` alone takes a file that was changed within its old time for the old one
            kept = Path(config.HF_DATASETS_CACHE) / "mergekit_moe" / "read" / digest(_content(source, data_dir, what))
            return load_dataset(**given, cache_dir=str(kept))
        # Private rows may be among these: what `datasets` would leave in its cache is gone when this returns.
        with tempfile.TemporaryDirectory() as cache:
            return load_dataset(**given, cache_dir=cache, keep_in_memory=True)
    except (DatasetsError, OSError, EOFError, zlib.error, ValueError, StopIteration) as error:  # the last: it is empty
        reason = " ".join(str(error.__cause__ or error).split()) or "it is empty"
        raise DataError(f"{what}: {_name(source)} can't be read: {reason}") from None


def _builder(path: Path, what: str) -> str:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in _BUILDERS:
        raise DataError(
            f"{what}: {path.name} is of no known kind; "
            f"allowed are {', '.join(_BUILDERS)} (.gz too), a folder or a Hub id"
        )
    return _BUILDERS[suffix]


def _content(source: DataSource, data_dir: Path, what: str, tell: Callable[[str], None] | None = None) -> Any:
    if source.installed is not None:
        return _installed_content(source.installed)
    path = data_dir / str(source.dataset)
    if path.is_dir():
        return digest([[str(p.relative_to(path)), sha256_once(p)] for p in sorted(path.rglob("*")) if p.is_file()])
    if path.exists():
        return sha256_once(path)
    return hub.resolve_dataset(str(source.dataset), source.revision, what, tell=tell)


@functools.cache
def _installed_content(corpus: str) -> str:
    return digest([(row["id"], _text_or_digest(row)) for row in _CORPORA[corpus]()])


def _text_or_digest(row: dict[str, Any]) -> str:
    return row["text"] if "text" in row else hashlib.sha256(row[IMAGE]).hexdigest()


def _matches(row: dict[str, Any], source: DataSource) -> bool:
    return all(row[column] in (v if isinstance(v, list) else [v]) for column, v in source.where.items())


def _require_column(column: str, columns: list[str], source: DataSource, what: str) -> None:
    if column not in columns:
        raise DataError(f"{what}: {_name(source)} has no column '{column}'; its columns are {', '.join(columns)}")


def _name(source: DataSource) -> str:
    return source.dataset or f"installed:{source.installed}"
