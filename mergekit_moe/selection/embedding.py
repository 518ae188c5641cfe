"""Sentence embeddings: unit vectors, float32, by sentence-transformers."""

import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.errors import SelectionError
from mergekit_moe.hub import Resolved, resolve_model

_PACKAGE = "package:"


def resolve_embedder(name: str, base: Path) -> Resolved:
    """Return where the embedder lies: a folder, an installed package's model, or a Hub repository at a commit.

    Raises:
        SelectionError: if the package isn't installed or holds no model.
        ExpertError: if it is neither a folder nor to be had from the Hub.
    """
    if not name.startswith(_PACKAGE):
        return resolve_model(name, None, base, "selection.embedder")
    package = name.removeprefix(_PACKAGE)
    try:
        folder = importlib.import_module(package).get_model_path()
    except (ImportError, AttributeError):
        raise SelectionError(
            f"selection.embedder: {name} is not installed, or has no get_model_path(); "
            "`pip install 'mergekit_moe[quickstart]'` brings the quickstart's, production recipes name a Hub id"
        ) from None
    return Resolved(Path(folder), name, importlib.metadata.version(package.replace("_", "-")))


def load_embedder(folder: Path, max_length: int | None) -> Any:
    """Return a SentenceTransformer from a folder; `max_length` is in tokens."""
    from sentence_transformers import SentenceTransformer

    embedder = SentenceTransformer(str(folder), trust_remote_code=False)
    if max_length is not None:
        embedder.max_seq_length = max_length
    return embedder


def embed(embedder: Any, texts: list[str]) -> NDArray[np.float32]:
    """Return (N, D) unit rows, one a text; each distinct text is embedded once."""
    distinct = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(distinct)}
    vectors = embedder.encode(distinct, normalize_embeddings=True, show_progress_bar=sys.stderr.isatty())
    return np.asarray(vectors, dtype=np.float32)[[place[text] for text in texts]]


def sample_texts(texts: list[str], limit: int, seed: int) -> list[str]:
    """Return at most `limit` of the texts, drawn without replacement."""
    if len(texts) <= limit:
        return texts
    rows = np.random.default_rng(seed).permutation(len(texts))[:limit]
    return [texts[i] for i in sorted(rows)]


def save_embeddings(vectors: NDArray[np.float32], folder: Path) -> None:
    """Write the pool's embeddings; row i of the file is row i of the pool."""
    np.save(folder / "embeddings.npy", vectors)


def load_embeddings(folder: Path) -> NDArray[np.float32]:
    """Return the embeddings that `save_embeddings` wrote, memory-mapped."""
    return np.load(folder / "embeddings.npy", mmap_mode="r")
