"""How well a choice of public rows stands in for texts that can't leave: MMD and coverage.

Both go by embeddings of private texts that the selection never saw; they stay with the client.
Shapes: K rows picked, M private rows, D embedding size.
"""

import numpy as np
from numpy.typing import NDArray


def squared_mmd(picked_KD: NDArray[np.floating], private_MD: NDArray[np.floating]) -> float:
    """Return the squared maximum mean discrepancy of two samples, 0 for one distribution (Gretton et al. 2012, Eq. 5).

    Biased estimate, Gaussian kernel; its width is the median distance among the private rows, so that values for
    the same private rows compare.
    """
    picked, private = (np.asarray(rows, dtype=np.float64) for rows in (picked_KD, private_MD))

    def squares(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2.0 * a @ b.T, 0.0)

    among = squares(private, private)
    width = float(np.median(among[np.triu_indices(len(private), 1)])) or 1.0

    def kernel(distances: NDArray[np.float64]) -> float:
        return float(np.exp(-distances / (2.0 * width)).mean())

    return kernel(squares(picked, picked)) + kernel(among) - 2.0 * kernel(squares(picked, private))


def coverage(picked_KD: NDArray[np.floating], private_MD: NDArray[np.floating]) -> float:
    """Return the mean, over private rows, of the best cosine to a row picked, in [-1, 1]."""
    cosines = np.asarray(private_MD, dtype=np.float64) @ np.asarray(picked_KD, dtype=np.float64).T
    return float(cosines.max(axis=1).mean())
