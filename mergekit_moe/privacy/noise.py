"""Clipping, and noise that nobody can compute again.

Shapes: N rows, D numbers a row.
"""

import math
import secrets

import numpy as np
from numpy.typing import NDArray


def fresh_generator() -> np.random.Generator:
    """Return a generator seeded by the operating system.

    Never by the recipe's seed: that is published, and who knows the seed subtracts the noise. Its numbers are floats
    of PCG64, as in most software of the kind: no defence against attacks on how floats round (Mironov 2012).
    """
    return np.random.default_rng(secrets.randbits(256))


def clip_rows(rows_ND: NDArray[np.floating], clip: float) -> NDArray[np.float64]:
    """Return the rows, float64, each scaled down to L2 norm `clip` where it is longer."""
    rows = np.asarray(rows_ND, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * np.minimum(1.0, clip / np.maximum(norms, np.finfo(np.float64).tiny))


def clipped_sum(rows_ND: NDArray[np.floating], clip: float) -> NDArray[np.float64]:
    """Return (D,) the sum of the clipped rows; any one row changes it by at most `clip` in L2 norm."""
    return clip_rows(rows_ND, clip).sum(axis=0)


def gaussian(size: int, scale: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return (size,) independent normal numbers of standard deviation `scale`."""
    return rng.normal(scale=scale, size=size)


def noise_to_signal(noise_multiplier: float, size: int, *, rows: float, steps: int = 1) -> float:
    """Return the norm of all steps' noise over the greatest norm that all steps' sums of clipped rows can have.

    Args:
        size: how many numbers are noised.
        rows: how many rows take part in a step, expected.
    """
    return noise_multiplier * math.sqrt(size * steps) / (rows * steps)
