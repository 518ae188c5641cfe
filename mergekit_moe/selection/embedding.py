"""Sentence embeddings: unit vectors, float32, by sentence-transformers."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.errors import SelectionError
from mergekit_moe.hub import Resolved, resolve_model
from mergekit_moe.workspace import process_state


def resolve_embedder(name: str, base: Path, tell: Callable[[str], None] = lambda line: None) -> Resolved:
    """Return where the embedder lies: a folder, an installed package's model, or a Hub repository at a commit.

    Args:
        tell: is given a sentence if the cache has to do for the Hub.

    Raises:
        ExpertError: if it is none of these.
    """
    return resolve_model(name, None, base, "selection.embedder", tell=tell)


def load_embedder(folder: Path, max_length: int | None, backend: str = "torch") -> Any:
    """Return a SentenceTransformer from a folder, on this process's device; `max_length` is in tokens.

    Args:
        backend: "torch", or "openvino": several times as fast on CPUs, the same vectors but for rounding.

    Raises:
        SelectionError: if OpenVINO's vectors differ from torch's.
    """
    from sentence_transformers import SentenceTransformer

    device = str(process_state().device)
    embedder = SentenceTransformer(str(folder), trust_remote_code=False, device=device)
    if max_length is not None:
        embedder.max_seq_length = max_length
    if backend == "openvino":
        from mergekit_moe.selection.openvino import accelerate

        accelerate(embedder)
    return embedder


def choose_backend(asked: str) -> str:
    """Return "openvino" or "torch": for "auto", OpenVINO where it is installed and there is no accelerator.

    Raises:
        SelectionError: if OpenVINO was asked for by name and isn't installed.
    """
    if asked == "torch":
        return asked
    installed = importlib.util.find_spec("openvino") is not None
    if asked == "openvino" and not installed:
        raise SelectionError(
            "selection.embedder_backend is openvino, which is not installed; "
            "`pip install 'mergekit_moe[openvino]'`, or use auto or torch"
        )
    if asked == "auto" and installed:
        import torch

        installed = not torch.accelerator.is_available()
    return "openvino" if installed else "torch"


def embed(embedder: Any, texts: Sequence[str]) -> NDArray[np.float32]:
    """Return (N, D) unit rows, one a text; each distinct text is embedded once.

    Raises:
        SelectionError: if something among them is no text, or an empty one.
    """
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            given = f"{type(text).__name__} {text!r:.40}"
            raise SelectionError(f"texts[{row}] is {given}; an embedder reads strings that aren't empty")
    distinct = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(distinct)}
    vectors = embedder.encode(distinct, normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(vectors, dtype=np.float32)[[place[text] for text in texts]]


def too_long(embedder: Any, texts: Sequence[str]) -> int:
    """Return how many texts have more tokens than the embedder reads; what stands after those counts for nothing."""
    if embedder.max_seq_length is None:
        return 0
    ids = embedder.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    return sum(len(tokens) > embedder.max_seq_length for tokens in ids)


def sample_texts(texts: list[str], limit: int, seed: int) -> list[str]:
    """Return at most `limit` of the texts, drawn without replacement."""
    if len(texts) <= limit:
        return texts
    rows = np.random.default_rng(seed).permutation(len(texts))[:limit]
    return [texts[i] for i in sorted(rows)]
