"""Numbers for each text of a pool, above all its embeddings: made by all processes, in blocks that outlive a kill.

Shapes: N rows of the pool, U distinct texts among them, D embedding size.
"""

import hashlib
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.errors import SelectionError
from mergekit_moe.selection.embedding import embed, too_long
from mergekit_moe.selection.processes import ALONE, Processes
from mergekit_moe.workspace import read_json, write_json

VECTORS, FIRSTS, ABOUT = "embeddings.npy", "first_occurrence.npy", "embedding.json"
GAINS = "gains.npy"
_BLOCKS = "blocks"
_TEXTS_A_BLOCK = 2048
"""What a kill can cost, and what a process takes at a time."""
_AT_ONCE = 65_536

Compute = Callable[[list[Any]], tuple[NDArray[np.floating], int]]
"""Distinct texts, or image files' bytes -> (n, D) numbers, and how many of the texts were too long to be read whole."""


def embed_pool(
    embedder: Any,
    texts: Sequence[Any],
    out: Path,
    *,
    dtype: str = "float32",
    processes: Processes = ALONE,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Write the (N, D) embeddings of N texts to the folder `out`: see `fill`.

    Args:
        embedder: see `load_embedder`.
        dtype: of the embeddings as stored, float32 or float16.

    Raises:
        SelectionError: if the embedder gives numbers that aren't finite.
    """

    def compute(block: list[Any]) -> tuple[NDArray[np.floating], int]:
        return embed(embedder, block).astype(dtype), too_long(embedder, block)

    fill(compute, texts, out, VECTORS, processes=processes, wait=wait)


def fill(
    compute: Compute,
    texts: Sequence[Any],
    out: Path,
    name: str,
    *,
    processes: Processes = ALONE,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Write what `compute` gives for N texts to the folder `out`; what an earlier call left there is not made again.

    Each distinct text is computed once, in blocks of 2,048 that the processes deal out among themselves; a block is
    a file, whole or not there. Blocks don't depend on how many processes there are, nor do their numbers.

    Args:
        texts: may be slow to index; slices are read in order.
        out: gets the file `name` (N, D), first_occurrence.npy (N,) int64, the row that first has a row's text, and
            embedding.json with the counts of rows, distinct texts, and texts that were too long.
        wait: lets every process arrive before any goes on.

    Raises:
        SelectionError: if numbers aren't finite.
    """
    if (out / ABOUT).is_file():
        wait()
        if processes.rank == 0:
            shutil.rmtree(out / _BLOCKS, ignore_errors=True)
        return
    first_N = _first_occurrences(texts)
    distinct_U = np.flatnonzero(first_N == np.arange(len(first_N)))
    blocks = [distinct_U[at : at + _TEXTS_A_BLOCK] for at in range(0, len(distinct_U), _TEXTS_A_BLOCK)]
    (out / _BLOCKS).mkdir(exist_ok=True)
    for number in _shown(range(processes.rank, len(blocks), processes.world_size), processes):
        file = _block(out, number)
        if not file.is_file():
            rows = blocks[number]
            taken = texts[int(rows[0]) : int(rows[-1]) + 1]
            _write_block(file, compute, [taken[row] for row in (rows - rows[0]).tolist()], rows)
    wait()
    if processes.rank == 0:
        _join_blocks(out, name, first_N, distinct_U, len(blocks))
    wait()


def load_embeddings(folder: Path) -> NDArray[np.floating]:
    """Return the (N, D) embeddings that `embed_pool` wrote, memory-mapped."""
    return np.load(folder / VECTORS, mmap_mode="r")


def repeated_rows(folder: Path) -> NDArray[np.bool_]:
    """Return (N,) True for rows whose text stands in an earlier row, too."""
    first_N = np.load(folder / FIRSTS, mmap_mode="r")
    return first_N != np.arange(len(first_N))


def _first_occurrences(texts: Sequence[Any]) -> NDArray[np.int64]:
    """Return (N,) the first row with the same text, by 64 bits of its hash: 8 bytes a row, whatever the texts' size."""
    hashes_N = np.empty(len(texts), dtype=np.uint64)
    for at in range(0, len(texts), _AT_ONCE):
        for row, text in enumerate(texts[at : at + _AT_ONCE], start=at):
            content = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
            hashes_N[row] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
    _, first, inverse = np.unique(hashes_N, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def _shown(numbers: range, processes: Processes) -> Any:
    from tqdm.auto import tqdm

    quiet = processes.rank > 0 or not sys.stderr.isatty()
    return tqdm(numbers, desc="reading the pool", unit=f" x {_TEXTS_A_BLOCK:,} texts", disable=quiet)


def _block(out: Path, number: int) -> Path:
    return out / _BLOCKS / f"{number:06d}.safetensors"


def _write_block(file: Path, compute: Compute, texts: list[Any], rows: NDArray[np.int64]) -> None:
    from safetensors.numpy import save_file

    values, too_long = compute(texts)
    if bad := np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
        raise SelectionError(
            f"the model gives numbers that aren't finite for {len(bad)} of {len(texts)} pool texts, "
            f"row {rows[bad[0]]} first; choose another model, or leave these rows out"
        )
    partial = file.with_suffix(".partial")
    save_file({"values": values}, partial, metadata={"too_long": str(too_long)})
    partial.replace(file)


def _join_blocks(out: Path, name: str, first_N: NDArray[np.int64], distinct_U: NDArray[np.int64], blocks: int) -> None:
    def opened(number: int) -> Any:
        from safetensors import safe_open

        return safe_open(_block(out, number), framework="numpy")

    def values(number: int) -> Any:
        with opened(number) as block:
            return block.get_tensor("values")

    longer = 0
    for number in range(blocks):
        with opened(number) as block:
            longer += int(block.metadata()["too_long"])
    sample = values(0)
    shape = (len(first_N), sample.shape[1])
    joined = np.lib.format.open_memmap(out / name, mode="w+", dtype=sample.dtype, shape=shape)
    place_N = np.searchsorted(distinct_U, first_N)
    for at in range(0, len(first_N), _AT_ONCE):
        place = place_N[at : at + _AT_ONCE]
        for number in np.unique(place // _TEXTS_A_BLOCK).tolist():
            here = np.flatnonzero(place // _TEXTS_A_BLOCK == number)
            joined[at + here] = values(number)[place[here] % _TEXTS_A_BLOCK]
    joined.flush()
    np.save(out / FIRSTS, first_N)
    # Last, and by rename: where this file is, all is done.
    write_json(out / "about.partial", {"rows": len(first_N), "distinct": len(distinct_U), "too_long": longer})
    (out / "about.partial").replace(out / ABOUT)
    shutil.rmtree(out / _BLOCKS)


def embedding_report(folder: Path) -> dict[str, int]:
    """Return the counts that `fill` wrote: rows, distinct, too_long."""
    return read_json(folder / ABOUT)
