"""Full fine-tunes as factored experts: the truncated SVD of what they changed.

Shapes: a difference is (out, in); A is (r, in), B (out, r), so that the difference is about B A.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_moe.recipe import Compression
from mergekit_moe.weights import raw_bytes

_OVERSAMPLING = 8
_POWER_ITERATIONS = 4
_EXACT_BELOW = 256
"""Ranks of a matrix up to which the exact SVD is as cheap."""


class Factors(NamedTuple):
    """A difference of low rank, and what it leaves out."""

    lora_A: Tensor
    lora_B: Tensor
    error: float
    """Norm of what is left out, over the difference's own."""


def low_rank(difference: Tensor, settings: Compression, *, seed: int) -> Factors:
    """Return the best factors of a given rank, or the fewest that keep a share of the squared norm.

    Large matrices are factored by randomised SVD (Halko et al. 2011, Algorithm 5.1, with power iterations); for
    `energy` its size doubles until enough is kept. The singular values are shared between A and B.

    Args:
        difference: (out, in), float32 or float64.
        seed: of the random directions.
    """
    full = min(difference.shape)
    total = float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
    if total == 0.0:
        empty = difference[:0, :0]
        return Factors(empty.new_zeros(0, difference.shape[1]), empty.new_zeros(difference.shape[0], 0), 0.0)
    size = min(settings.rank or 32, full)
    while True:
        left, values, right = _svd(difference, size, seed)
        kept = values.double().square().cumsum(0) / total
        if settings.rank is not None:
            rank = size
        else:
            assert settings.energy is not None
            rank = int((kept < settings.energy).sum()) + 1
        if rank <= size or size == full:
            rank = min(rank, size)
            break
        size = min(2 * size, full)
    root = values[:rank].sqrt()
    error = max(0.0, 1.0 - float(kept[rank - 1])) ** 0.5
    return Factors((right[:, :rank] * root).T.contiguous(), (left[:, :rank] * root).contiguous(), error)


def _svd(matrix: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `size` largest singular triplets: (out, size), (size,), (in, size)."""
    if min(matrix.shape) <= max(_EXACT_BELOW, 2 * (size + _OVERSAMPLING)):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :size], values[:size], right[:size].T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(matrix, q=size + _OVERSAMPLING, niter=_POWER_ITERATIONS)
    return left[:, :size], values[:size], right[:, :size]


class Spool:
    """Tensors that are made before the file they belong to can be: kept on disk, read back one by one."""

    def __init__(self, folder: Path) -> None:
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it lives as long as the spool

    def add(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Store a tensor; return what reads it back."""
        start = self._file.seek(0, 2)
        self._file.write(raw_bytes(tensor.contiguous()))
        dtype, shape = tensor.dtype, tensor.shape

        def read() -> Tensor:
            self._file.seek(start)
            data = torch.empty(shape, dtype=dtype)
            self._file.readinto(raw_bytes(data))
            return data

        return read
