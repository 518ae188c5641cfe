"""Where models and data sets come from: folders, or the Hub with every revision pinned to a commit."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_moe.checkpoint import Header, header_length, parse_header, read_header
from mergekit_moe.errors import DataError, ExpertError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "README.md"]
_MODEL_FILES = [*_SMALL_FILES, "*.safetensors"]
"""Weights as safetensors, configuration and tokenizer; never pickles, never code."""


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
        if self.revision is None or (self.folder / file).is_file():
            return read_header(self.folder / file, what)
        return _remote_header(self, file, what)


def resolve_model(source: str, revision: str | None, base: Path, what: str, *, weights: bool = True) -> Resolved:
    """Return a folder as it is, or download a Hub repository at one commit.

    Args:
        base: where relative folders start.
        what: how an error names it, such as "base_model" or "expert 'law'".
        weights: False to leave the weights on the Hub for now: they are gigabytes, and their headers say enough.

    Raises:
        ExpertError: if it is neither a folder nor to be had from the Hub; the text says why.
    """
    folder = base / source
    if folder.is_dir():
        if revision is not None:
            raise ExpertError(f"{what}: 'revision' is for Hub repositories, and {source} is a folder; drop it")
        return Resolved(folder, source, None)
    if folder.exists() or _is_path(source):
        raise ExpertError(f"{what}: {source} is not a folder; give a model's folder or a Hub id such as org/name")
    from huggingface_hub import model_info, snapshot_download

    sha = _commit(model_info, source, revision, what, ExpertError)
    downloaded = snapshot_download(source, revision=sha, allow_patterns=_MODEL_FILES if weights else _SMALL_FILES)
    return Resolved(Path(downloaded), source, sha)


def _remote_header(model: Resolved, file: str, what: str) -> Header:
    """Fetch a safetensors file's header by range requests; its size tells whether the file is whole."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HTTPError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    where = f"{what}: {model.source}/{file} at {str(model.revision)[:7]}"
    url = hf_hub_url(model.source, file, revision=model.revision)

    def part(first: int, last: int) -> bytes:
        headers = {**build_hf_headers(), "Range": f"bytes={first}-{last}"}
        response = http_backoff("GET", url, headers=headers, follow_redirects=True)
        hf_raise_for_status(response)
        return response.content if response.status_code == 206 else response.content[first : last + 1]

    try:
        size = get_hf_file_metadata(url).size or 0
        length = header_length(part(0, 7), size, where)
        return parse_header(part(8, 7 + length), size, where)
    except EntryNotFoundError:
        raise ExpertError(f"{where} is missing; only safetensors weights are read") from None
    except HTTPError as failure:
        raise ExpertError(
            f"{where} can't be read: the Hub did not answer ({type(failure).__name__}); try again"
        ) from None


def resolve_dataset(source: str, revision: str | None, what: str) -> str:
    """Return `id@sha`: a Hub data set at the commit that its revision stands for now.

    Raises:
        DataError: if it is not to be had; the text says why.
    """
    if _is_path(source) or Path(source).suffix in (".jsonl", ".json", ".gz", ".csv", ".parquet", ".txt"):
        raise DataError(f"{what}: no such file or folder: {source}; relative paths start at data_dir (--data-dir)")
    from huggingface_hub import dataset_info

    return f"{source}@{_commit(dataset_info, source, revision, what, DataError)}"


def load_hub_dataset(
    source: str, revision: str | None, split: str, what: str, *, streaming: bool = False
) -> "Dataset | IterableDataset":
    """Return one split of a Hub data set at its pinned commit; streamed, its rows come as they are read.

    Raises:
        DataError: if it is not to be had, or has no such split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    sha = resolve_dataset(source, revision, what).rpartition("@")[2]
    try:
        return load_dataset(source, revision=sha, split=split, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(f"{what}: {source}@{sha[:7]} can't be read: {' '.join(str(error).split())}") from None


def _is_path(source: str) -> bool:
    """True for what can't be a Hub id, so that a mistyped path is not looked up there."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def _commit(info: Any, source: str, revision: str | None, what: str, error: type[Exception]) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,  # the client library's own, whichever that is
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return str(info(source, revision=revision).sha)
    except GatedRepoError:
        reason = "is gated; ask for access on its page and log in with `hf auth login`"
    except RevisionNotFoundError:
        reason = f"has no revision '{revision}'; give a branch, tag or commit of it"
    except RepositoryNotFoundError:
        reason = "is neither a folder here nor a repository on the Hub that you can see; check the name, or log in"
    except HFValidationError:
        reason = "is neither a folder here nor a valid Hub id; give a folder or an id such as org/name"
    except OfflineModeIsEnabled:
        reason = "is no folder here, and offline mode keeps it from being looked up on the Hub; unset HF_HUB_OFFLINE"
    except HTTPError as failure:
        reason = (
            f"is no folder here, and the Hub did not answer ({type(failure).__name__}); check the path, or try again"
        )
    raise error(f"{what}: {source} {reason}")
