"""Writing what a merge planned: in its type, with progress, and not onto a full disk."""

import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_moe.checkpoint import companions
from mergekit_moe.errors import WorkspaceError
from mergekit_moe.experts import Base
from mergekit_moe.weights import DTYPES, Planned, planned_bytes, torch_dtype, write_weights

_MARGIN = 50_000_000
"""Bytes for all that lies beside the weights."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block torch computes on one thread: a stream waits for memory, and threads that wait burn time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write_checkpoint(out: Path, sections: list[list[Planned]]) -> dict[str, str]:
    """Write the shards and their index to the folder `out`; return each shard's sha256.

    Each section begins a shard.

    Raises:
        WorkspaceError: if the disk has no room for them, before anything is written.
    """
    from tqdm import tqdm

    size, free = planned_bytes(sections), shutil.disk_usage(out).free
    if size + _MARGIN > free:
        raise WorkspaceError(
            f"the result takes {size / 1e6:,.0f} MB and {out.parent} has {free / 1e6:,.0f} MB free; make room, or "
            "choose another --workspace"
        )
    with one_thread(), tqdm(total=size, unit="B", unit_scale=True, desc="merging", disable=None) as bar:
        return write_weights(out, [section for section in sections if section], told=bar.update)


def copy_companions(base: Base, out: Path) -> None:
    """Copy the base's tokenizer, image processor, generation and pooling files, byte for byte."""
    for file in companions(base.source.folder):
        copy = out / file.relative_to(base.source.folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def typed_config(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return a config.json that says which type the weights have now, and nothing of where the base lay.

    Nor does it name code of the base's own, which isn't copied: the library's class is what was merged.
    """
    config = {key: value for key, value in config.items() if key != "_name_or_path"}
    if dtype is None:
        return config
    return {**{key: value for key, value in config.items() if key != "torch_dtype"}, "dtype": dtype}


def in_type(tensor: Planned, dtype: str | None) -> Planned:
    """Return a planned tensor in another floating type; whole numbers stay what they are."""
    if dtype is None or not torch_dtype(tensor.dtype).is_floating_point:
        return tensor
    name = next(name for name, known in DTYPES.items() if known == dtype)
    return tensor._replace(dtype=name, make=functools.partial(_cast, tensor, getattr(torch, dtype)), check=None)


def _cast(tensor: Planned, dtype: torch.dtype) -> Tensor:
    return (tensor.check or tensor.make)().to(dtype)
