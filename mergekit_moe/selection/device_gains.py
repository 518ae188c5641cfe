"""A DPP's gains on an accelerator: all rows brought up to date at every pick, by one product of N x D.

Shapes: N candidates, K selected, D embedding size.
"""

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mergekit_moe.selection.gains import EXHAUSTED, Gains, check_scores

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 262_144
"""Rows converted to float64 at a time."""


def is_on_device(embeddings: Any) -> bool:
    """True for a tensor on an accelerator."""
    torch = sys.modules.get("torch")  # who gives a tensor has imported it
    return torch is not None and isinstance(embeddings, torch.Tensor) and embeddings.device.type != "cpu"


def check_on_device(embeddings: Any, relevance: ArrayLike) -> tuple[Any, NDArray[np.float64], NDArray[np.float64]]:
    """Do as `check_candidates` does, with the embeddings staying where they are."""
    import torch

    squares = torch.cat([block.double().square().sum(1) for block in embeddings.split(_BLOCK)])
    return embeddings, *check_scores(relevance, tuple(embeddings.shape), squares.cpu().numpy())


class DeviceGains(Gains):
    """Gains of the rows of a tensor, wherever it lies; all decisions in float64."""

    def __init__(
        self,
        features_ND: "Tensor",
        log_quality_N: NDArray[np.float64],
        squares_N: NDArray[np.float64],
        free_N: NDArray[np.bool_],
        epsilon: float,
    ) -> None:
        import torch

        super().__init__(features_ND.shape[1], epsilon)
        self.features = features_ND
        self.log_quality = torch.from_numpy(log_quality_N).to(features_ND.device)
        self.free = torch.from_numpy(free_N).to(features_ND.device, copy=True)
        self.variance = torch.from_numpy(squares_N).to(features_ND.device) + epsilon

    def best(self) -> tuple[int, float] | None:
        """Return the row of greatest gain and that gain; None if no row that is left adds to the span."""
        import torch

        left = self.free & (self.variance > (EXHAUSTED if self.epsilon == 0.0 else 0.0))
        gain = torch.where(left, self.log_quality + self.variance.clamp(min=1e-300).log(), -torch.inf)
        if len(gain) == 0:
            return None
        row = int(gain.argmax())
        return None if gain[row] == -torch.inf else (row, float(gain[row]))

    def feature(self, row: int) -> NDArray[np.float64]:
        return self.features[row].double().cpu().numpy()

    def take(self, feature: NDArray[np.float64], row: int | None) -> None:
        """Condition on a picked row's feature (D,); `row` is its number if it is one of these."""
        import torch

        direction = torch.from_numpy(self.new_direction(feature)).to(self.features.device)
        self.variance -= torch.cat([(block.double() @ direction).square() for block in self.features.split(_BLOCK)])
        if row is not None:
            self.free[row] = False

    def start_nugget(self, epsilon: float, picked_KD: NDArray[np.float64]) -> None:
        """Go on past the rank: the same picks under a kernel with a nugget."""
        import torch

        self.start_matrix(epsilon, picked_KD)
        matrix = torch.from_numpy(self.matrix).to(self.features.device)
        blocks = self.features.split(_BLOCK)
        explained = [((block.double() @ matrix) * block.double()).sum(1) for block in blocks]
        self.variance = epsilon * (1.0 + torch.cat(explained))
