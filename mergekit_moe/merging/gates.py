"""Routers that need no proxy: made from the experts' weights, or from nothing.

A row depends on its own expert alone, so that experts can be added and dropped. Shapes: K experts, H hidden.

SpectR (Fleshman and Van Durme 2025) isn't here: it scores by the norm of the expert's whole change, h' V S^2 V' h,
which no row says. The best that one row can say of it, by absolute score, is its first term: `arrow`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mergekit_moe.experts import Base, Expert
from mergekit_moe.updates import Update
from mergekit_moe.workspace import digest

_EXACT_UP_TO = 1024
"""Hidden size up to which a whole FFN's first singular vector is computed exactly; beyond, by subspace iteration."""


def uniform(base: Base, expert: Expert | None, name: str, layer: int, seed: int) -> Tensor:
    """Every expert scores zero."""
    return torch.zeros(base.sized["hidden_size"])


def random(base: Base, expert: Expert | None, name: str, layer: int, seed: int) -> Tensor:
    """Independent normal numbers of variance 1 / H, by the expert's name."""
    size = base.sized["hidden_size"]
    generator = torch.Generator().manual_seed(int(digest([seed, name, layer])[:12], 16))
    return torch.randn(size, generator=generator) / math.sqrt(size)


def arrow(base: Base, expert: Expert | None, name: str, layer: int, seed: int) -> Tensor:
    """The unit direction of the FFN's input that the expert's change answers most (Arrow, Ostapenko et al. 2024).

    It is the first right singular vector of what the expert changed in the FFN's input maps, one above the other. Its
    sign means nothing, so that the router has to take absolute scores. An anchor changes nothing: its row is zero.
    """
    block = base.architecture.ffn.format(layer=layer)
    updates: list[tuple[str, Update]] = []
    for projection in base.architecture.inputs if expert is not None else ():
        weight = f"{block}.{projection}.weight"
        if weight in expert.updates:  # type: ignore[union-attr]
            updates.append((weight, expert.updates[weight]))  # type: ignore[union-attr]
    if not updates:
        return torch.zeros(base.sized["hidden_size"])
    if all(update.is_low_rank for _, update in updates):
        return _of_factors([update for _, update in updates])
    difference = torch.cat([update.difference(base.weights.read(name)) for name, update in updates])
    if difference.shape[1] <= _EXACT_UP_TO:
        return _first(torch.linalg.eigh(difference.double().T @ difference.double()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, values, right = torch.svd_lowrank(difference, q=min(8, *difference.shape), niter=8)
    return _first((values.flip(0), right.flip(1)))


def _of_factors(updates: list[Update]) -> Tensor:
    """Return the same of changes scale * B A, from their factors."""
    factors = [(factor.double() for factor in update.factors()) for update in updates]
    matrices_A, matrices_B = zip(*factors, strict=True)
    basis, turned = torch.linalg.qr(torch.cat(matrices_A).T)
    grams = [update.scale**2 * (lora_B.T @ lora_B) for update, lora_B in zip(updates, matrices_B, strict=True)]
    inner = torch.block_diag(*grams)
    return (basis @ _first(torch.linalg.eigh(turned @ inner @ turned.T)).double()).float()


def _first(found: tuple[Tensor, Tensor]) -> Tensor:
    """Return the vector of the largest value, the last one; zeros if that is zero: no change has no direction.

    Args:
        found: values in ascending order, (n,), and vectors, (m, n).
    """
    values, vectors = found
    return vectors[:, -1].float() if float(values[-1]) > 0.0 else torch.zeros_like(vectors[:, -1]).float()


GATES: dict[str, Any] = {"uniform": uniform, "random": random, "arrow": arrow}
"""`router.start` -> function of (base, expert or None for the anchor, its name, layer, seed) to a row, float32 (H,)."""
