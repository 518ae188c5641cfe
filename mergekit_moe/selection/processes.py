"""Processes of `accelerate launch` that share a pool: which rows are whose, and how they hear of each other.

Shapes: N rows of the whole pool, n rows of one process's share, D embedding size.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.workspace import process_state


class Processes(NamedTuple):
    """This process among all; with the defaults it is alone, and nothing here imports torch."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def of_launch(cls) -> "Processes":
        """Return this process's place among those that `accelerate launch` started."""
        state = process_state()
        return cls(state.process_index, state.num_processes)

    def share(self, rows: int) -> slice:
        """Return the rows of an (N, ...) array that are this process's: shares lie one after the other."""
        return slice(rows * self.rank // self.world_size, rows * (self.rank + 1) // self.world_size)

    def join(self, share: NDArray[Any]) -> NDArray[Any]:
        """Return all processes' (n, ...) shares as one (N, ...) array, in every process."""
        if self.world_size == 1:
            return share
        from accelerate.utils import gather_object

        return np.concatenate(gather_object([share]))

    def from_first(self, value: Any) -> Any:
        """Return the first process's value in every process."""
        if self.world_size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def greatest(self, gain: float, row: int, feature_D: NDArray[np.float64]) -> tuple[float, int, NDArray[np.float64]]:
        """Return the gain, row and feature (D,) of the process whose gain is greatest; of equals, the lowest row's.

        One message of D + 2 numbers from each process.
        """
        if self.world_size == 1:
            return gain, row, feature_D
        import torch
        from accelerate.utils import gather

        # Row numbers below 2^53 are exact in float64.
        message = torch.from_numpy(np.concatenate([[gain, row], feature_D]))[None]
        heard = gather(message.to(process_state().device)).cpu().numpy()
        best = heard[np.lexsort((heard[:, 1], -heard[:, 0]))[0]]
        return float(best[0]), int(best[1]), best[2:]


ALONE = Processes()
