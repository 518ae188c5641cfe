"""What an expert makes of one tensor of its base, whatever the expert was published as.

Shapes: a weight is (out, in); LoRA's A is (r, in) and B (out, r).
"""

from typing import TYPE_CHECKING, NamedTuple

from mergekit_moe.weights import CHUNK, Weights, chunks

if TYPE_CHECKING:
    from torch import Tensor


class Update(NamedTuple):
    """W' = m * normalised(W + scale * B A) + shift, of which most experts use one part.

    Each part names a tensor of the expert's own weights.
    """

    weights: Weights
    """The expert's."""
    whole: str | None = None
    """Stands in place of W: a full fine-tune's tensor, or one that the adapter trained whole."""
    lora_A: str | None = None
    lora_B: str | None = None
    scale: float = 1.0
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    magnitude: str | None = None
    """DoRA's m, (out,): the norm that each row has in the end; of an embedding, each column."""
    shift: str | None = None
    """Added to a bias, times `scale`."""
    turned: bool = False
    """An embedding's factors: the difference is (B A) transposed."""

    @property
    def rank(self) -> int:
        """Of the factors; 0 without any."""
        return 0 if self.lora_A is None else self.weights.shape(self.lora_A)[0]

    @property
    def is_low_rank(self) -> bool:
        """True if a factored expert can hold the update exactly."""
        return self.lora_A is not None and self.whole is None and self.magnitude is None and not self.turned

    def factors(self) -> "tuple[Tensor, Tensor]":
        """Return A and B, as published."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        return self.weights.read(self.lora_A), self.weights.read(self.lora_B)

    def apply(self, base: "Tensor") -> "Tensor":
        """Return the expert's own tensor, in the base's type; computed in float32 (float64 for float64)."""
        return self.exact(base).to(base.dtype)

    def exact(self, base: "Tensor") -> "Tensor":
        """Return the same before it is rounded to the base's type."""
        import torch

        tensor = base if self.whole is None else self.weights.read(self.whole)
        if self.lora_A is None and self.shift is None:
            return tensor
        tensor = wide(tensor)
        if self.shift is not None:
            return tensor + self.scale * self.weights.read(self.shift).to(tensor.dtype)
        lora_A, lora_B = (factor.to(tensor.dtype) for factor in self.factors())
        if self.turned:
            lora_A, lora_B = lora_B.T, lora_A.T
        tensor = torch.addmm(tensor, lora_B, lora_A, alpha=self.scale)
        if self.magnitude is not None:
            side = 0 if self.turned else 1
            magnitude = self.weights.read(self.magnitude).to(tensor.dtype).reshape(-1).unsqueeze(side)
            tensor *= magnitude / torch.linalg.vector_norm(tensor, dim=side, keepdim=True)
        return tensor

    def difference(self, base: "Tensor") -> "Tensor":
        """Return the expert's tensor less the base's, float32 or float64."""
        return wide(self.exact(base)) - wide(base)

    def squared_norm(self, base: "Tensor") -> float:
        """Return the squared Frobenius norm of the difference, without forming it where it is of low rank.

        It isn't finite if a value of either isn't.
        """
        import torch

        if self.is_low_rank:
            lora_A, lora_B = (factor.double() for factor in self.factors())
            return float(((lora_B.T @ lora_B) * (lora_A @ lora_A.T)).sum()) * self.scale**2
        if self.whole is not None and self.lora_A is None:
            return squared_distance(self.weights.view(self.whole), base)
        return float(torch.linalg.vector_norm(self.difference(base), dtype=torch.float64)) ** 2


def wide(tensor: "Tensor") -> "Tensor":
    """Return the tensor in a type to compute in: float32, or float64 if it is that already."""
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.float()


def squared_distance(left: "Tensor", right: "Tensor | None" = None) -> float:
    """Return the squared norm of left - right, or of left alone, holding a piece at a time."""
    import torch

    if right is not None and left.dtype == right.dtype and torch.equal(left, right):
        return 0.0
    kind = torch.float64 if left.dtype == torch.float64 else torch.float32
    # One buffer for all pieces: memory that comes fresh from the system costs more than the sums.
    buffer = torch.empty(min(CHUNK, left.numel()), dtype=kind)
    total = 0.0
    for mine, other in zip(chunks(left), chunks(left if right is None else right), strict=True):
        piece = buffer[: len(mine)].copy_(mine)
        total += float(torch.linalg.vector_norm(piece if right is None else piece.sub_(other))) ** 2
    return total
