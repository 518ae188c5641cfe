"""Weights that are read where they lie and written as they come: a merge holds a tensor, never a model."""

import functools
import hashlib
import json
import math
import mmap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_moe.checkpoint import WEIGHTS, Header, write_index
from mergekit_moe.errors import ExpertError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHARD_BYTES = 5_000_000_000
DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
"""safetensors' names of the types that can be merged -> torch's."""
_PIECE = 1 << 20
"""Bytes that are looked at, hashed and written at once, while they are in a cache."""
CHUNK = 1 << 16
"""Elements that are computed with at once where the result is one number: they fit into a cache."""


class Weights:
    """A checkpoint's tensors, each read when it is asked for, without a copy.

    The files are mapped shared and read-only. safetensors' own mapping is private and writable, so that a
    limit on a process's own memory counts every file as if it had been read into it.
    """

    def __init__(self, folder: Path, shards: dict[str, Header], what: str) -> None:
        """Know the tensors from their headers.

        Raises:
            ExpertError: if one is of a type that can't be merged.
        """
        self.folder = folder
        self.what = what
        self._where = {name: (shard, facts) for shard, header in shards.items() for name, facts in header.items()}
        self._maps: dict[str, mmap.mmap] = {}
        for name, (shard, facts) in self._where.items():
            if facts["dtype"] not in DTYPES:
                raise ExpertError(
                    f"{what}: {shard} holds {name} as {facts['dtype']}, which can't be merged; save it as bfloat16, "
                    "float16 or float32"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name][1]["shape"])

    def dtype(self, name: str) -> str:
        """Return the tensor's type as safetensors calls it."""
        return self._where[name][1]["dtype"]

    def shard(self, name: str) -> str:
        """Return the file that holds the tensor."""
        return self._where[name][0]

    def nbytes(self, name: str) -> int:
        first, last = self._where[name][1]["data_offsets"]
        return last - first

    def read(self, name: str) -> "Tensor":
        """Return a tensor, which must not be written to.

        Raises:
            ExpertError: if it holds a value that is not finite.
        """
        tensor = self.view(name)
        if not all_finite(tensor):
            raise ExpertError(
                f"{self.what}: {name} holds NaN or infinity ({self.shard(name)}); train it again, or drop it"
            )
        return tensor

    def view(self, name: str) -> "Tensor":
        """Return the same unchecked, for who sees by the result whether all values were finite."""
        import torch

        shard, facts = self._where[name]
        dtype, (first, last) = torch_dtype(facts["dtype"]), facts["data_offsets"]
        if first == last:
            return torch.empty(facts["shape"], dtype=dtype)
        data = self._map(shard)
        start = 8 + int.from_bytes(data[:8], "little") + first
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            tensor = torch.frombuffer(data, dtype=dtype, count=(last - first) // dtype.itemsize, offset=start)
        return tensor.view(facts["shape"])

    def _map(self, shard: str) -> mmap.mmap:
        if shard not in self._maps:
            with (self.folder / shard).open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]


class Planned(NamedTuple):
    """A tensor that is going to be written: all but its values."""

    name: str
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    make: "Callable[[], Tensor]"
    """Called once, when its turn comes."""
    check: "Callable[[], Tensor] | None" = None
    """The same, but says what is wrong with a value that isn't finite; where `make` itself doesn't look."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize


def torch_dtype(name: str) -> "torch.dtype":
    """Return torch's type of the name that safetensors has for it."""
    import torch

    return getattr(torch, DTYPES[name])


def all_finite(tensor: "Tensor") -> bool:
    """True if no value is NaN or infinite. A sum tells at a twentieth of the cost, unless it overflows."""
    import torch

    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor.sum())) or all(bool(torch.isfinite(part).all()) for part in chunks(tensor))


def raw_bytes(tensor: "Tensor") -> memoryview:
    """Return a contiguous tensor's own memory."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def chunks(tensor: "Tensor") -> "tuple[Tensor, ...]":
    """Return flat views that together are the tensor."""
    return tensor.reshape(-1).split(CHUNK)


def passed_through(weights: Weights, name: str, new_name: str | None = None) -> Planned:
    """Return a tensor that is written as it is; the writer looks at its values while it has them at hand."""
    return Planned(
        new_name or name,
        weights.dtype(name),
        weights.shape(name),
        functools.partial(weights.view, name),
        functools.partial(weights.read, name),
    )


def planned_bytes(sections: list[list[Planned]]) -> int:
    """Return the size of a checkpoint's tensors."""
    return sum(tensor.nbytes for section in sections for tensor in section)


def write_weights(
    out: Path,
    sections: list[list[Planned]],
    *,
    shard_bytes: int = SHARD_BYTES,
    told: Callable[[int], None] = lambda written: None,
) -> dict[str, str]:
    """Write a checkpoint's shards and their index, one tensor in memory at a time; return each shard's sha256.

    Args:
        out: the folder, without weights.
        sections: tensors in the order in which they are written; each section begins a shard.
        shard_bytes: a shard takes no further tensor that would make it larger.
        told: called after every tensor with its bytes, to show progress.
    """
    groups: list[list[Planned]] = []
    for section in sections:
        size = shard_bytes + 1
        for tensor in section:
            if size + tensor.nbytes > shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(tensor)
            size += tensor.nbytes
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [WEIGHTS]
    written = {name: _write_shard(out / name, group, told) for name, group in zip(names, groups, strict=True)}
    if len(groups) > 1:
        write_index(out, {name: header for name, (header, _) in written.items()})
    return {name: sha256 for name, (_, sha256) in written.items()}


def _not_finite(planned: Planned) -> ExpertError:
    """Return what is wrong with a tensor that holds NaN or infinity."""
    if planned.check is not None:
        planned.check()  # names whose tensor it is
    return ExpertError(
        f"merge: {planned.name} holds NaN or infinity as {DTYPES[planned.dtype]}; choose a merge.dtype of wider "
        "range, such as bfloat16, or leave out the expert with such large weights"
    )


def _write_shard(path: Path, tensors: list[Planned], told: Callable[[int], None]) -> tuple[Header, str]:
    """Write one shard; return its header and its sha256, taken while the bytes are at hand."""
    header: Header = {}
    end = 0
    for tensor in tensors:
        place = [end, end + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        end += tensor.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # so that tensors lie aligned, as the library writes them
    sha256 = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: Any) -> None:
            sha256.update(data)
            file.write(data)

        write(len(text).to_bytes(8, "little") + text)
        for planned in tensors:
            values = planned.make()
            assert tuple(values.shape) == planned.shape, planned.name
            assert values.dtype == torch_dtype(planned.dtype), planned.name
            for piece in values.contiguous().reshape(-1).split(_PIECE // values.element_size()):
                if not all_finite(piece):
                    raise _not_finite(planned)
                write(raw_bytes(piece))
            told(planned.nbytes)
    return header, sha256.hexdigest()
