"""Embeddings of texts or images: unit vectors, float32, by sentence-transformers or the base model itself."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.checkpoint import identity, weights_fingerprint
from mergekit_moe.errors import SelectionError
from mergekit_moe.hub import Resolved, resolve_model
from mergekit_moe.images import decode
from mergekit_moe.workspace import digest, file_sha256, process_state

_WHAT = "selection.embedder"
_IMAGES = 256
"""Decoded at a time: a pool's pixels need not fit into memory."""


def resolve_embedder(
    name: str, base: Path, tell: Callable[[str], None] = lambda line: None, *, weights: bool = True
) -> Resolved:
    """Return where the embedder lies: a folder, an installed package's model, or a Hub repository at a commit.

    Args:
        tell: is given a sentence if the cache has to do for the Hub.
        weights: False to leave them on the Hub for now.

    Raises:
        ExpertError: if it is none of these.
    """
    return resolve_model(name, None, base, _WHAT, weights=weights, tell=tell)


def embedder_fingerprint(folder: Path) -> str:
    """Return one digest of all files that an embedder's vectors depend on: weights, tokenizer, and its later layers."""
    later = [file_sha256(file) for file in sorted(folder.glob("[0-9]_*/*.safetensors"))]
    return identity(folder, digest([weights_fingerprint(folder, _WHAT), later]))


def load_embedder(folder: Path, max_length: int | None, backend: str = "torch", *, images: bool = False) -> Any:
    """Return a SentenceTransformer from a folder, on this process's device; `max_length` is in tokens.

    Args:
        backend: "torch", or "openvino": several times as fast on CPUs, the same vectors but for rounding.
        images: whether it has to read images.

    Raises:
        SelectionError: if OpenVINO's vectors differ from torch's, or it reads no images and has to.
    """
    from sentence_transformers import SentenceTransformer

    device = str(process_state().device)
    embedder = SentenceTransformer(str(folder), trust_remote_code=False, device=device)
    if images and not embedder.supports("image"):
        raise SelectionError(
            f"selection.embedder: {folder.name} reads {', '.join(map(str, embedder.modalities))}, and the rows are "
            "images; name a CLIP-style model, or seed"
        )
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


def embed(embedder: Any, texts: Sequence[Any]) -> NDArray[np.float32]:
    """Return (N, D) unit rows, one a text or image; each distinct one is embedded once.

    Args:
        texts: strings, or image files' bytes.

    Raises:
        SelectionError: if something among them is neither, or an empty text.
    """
    for row, text in enumerate(texts):
        if not isinstance(text, bytes) and not (isinstance(text, str) and text.strip()):
            given = f"{type(text).__name__} {text!r:.40}"
            raise SelectionError(f"texts[{row}] is {given}; an embedder reads strings that aren't empty")
    distinct = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(distinct)}
    vectors = _encoded(embedder, distinct)
    return np.asarray(vectors, dtype=np.float32)[[place[text] for text in texts]]


def _encoded(embedder: Any, distinct: list[Any]) -> NDArray[np.float32]:
    if not distinct or isinstance(distinct[0], str):
        return embedder.encode(distinct, normalize_embeddings=True, show_progress_bar=False)
    vectors = []
    for at in range(0, len(distinct), _IMAGES):
        pictures = [decode(content) for content in distinct[at : at + _IMAGES]]
        vectors.append(embedder.encode(pictures, normalize_embeddings=True, show_progress_bar=False))
    return np.concatenate(vectors)


def too_long(embedder: Any, texts: Sequence[Any]) -> int:
    """Return how many texts have more tokens than the embedder reads; what stands after those counts for nothing."""
    if embedder.max_seq_length is None or isinstance(texts[0], bytes):
        return 0
    ids = embedder.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    return sum(len(tokens) > embedder.max_seq_length for tokens in ids)


def sample_texts(texts: list[Any], limit: int, seed: int) -> list[Any]:
    """Return at most `limit` of the texts, drawn without replacement."""
    if len(texts) <= limit:
        return texts
    rows = np.random.default_rng(seed).permutation(len(texts))[:limit]
    return [texts[i] for i in sorted(rows)]
