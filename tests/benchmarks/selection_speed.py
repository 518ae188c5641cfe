"""Speed and memory of the selector beside the dense algorithm and other libraries' selectors.

    python tests/benchmarks/selection_speed.py [--rows 20000 1000000] [--dense] [--peers]

Rows are unit vectors in 200 clusters, 384 dimensions, float32; relevance is skewed, as classifiers' scores are.
Each figure comes from a process of its own; memory is what its peak lies above the embeddings. `--dense` runs
Chen et al.'s algorithm on the N x N kernel (as the authors' code does) in the same run, at 20,000 rows.
`--peers` runs what others offer, where it is installed (submodlib-py, apricot-select, linear_operator, scipy), at sizes
that they manage. Not part of the test suite: it says how fast, never whether right.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.selection.dpp import certificate_size, greedy_map

SIZE, CLUSTERS = 384, 200
BUDGETS = ((100, 0.0), (380, 0.0), (500, 0.1), (2_000, 0.1), (10_000, 0.1))


def pool(rows: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return embeddings (N, D) and relevance (N,)."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLUSTERS, SIZE)).astype(np.float32)
    features = np.empty((rows, SIZE), dtype=np.float32)
    for first in range(0, rows, 65_536):
        block = features[first : first + 65_536]
        block[:] = centres[rng.integers(0, CLUSTERS, len(block))] + rng.normal(size=block.shape)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return features, np.clip(rng.beta(0.3, 3.0, rows), 1e-6, 1.0)


def dense(features: NDArray[np.float32], relevance: NDArray[np.float64], budget: int) -> list[int]:
    """Chen et al. 2018, Algorithm 1, as published: the whole kernel, one Cholesky row a pick."""
    kernel = (features.astype(np.float64) @ features.T.astype(np.float64)) * relevance * relevance[:, None]
    rows = np.zeros((budget, len(kernel)))
    gain = kernel.diagonal().copy()
    picked = [int(gain.argmax())]
    while len(picked) < budget:
        k, last = len(picked) - 1, picked[-1]
        rows[k] = (kernel[last] - rows[:k, last] @ rows[:k]) / np.sqrt(gain[last])
        gain -= rows[k] ** 2
        gain[last] = -np.inf
        picked.append(int(gain.argmax()))
    return picked


def lapack(features: NDArray[np.float32], relevance: NDArray[np.float64], budget: int) -> list[int]:
    """Column-pivoted QR of all weighted rows: the same picks up to the rank, by LAPACK."""
    from scipy.linalg import qr

    weighted = (features * relevance[:, None].astype(np.float32)).T
    return qr(weighted, mode="r", pivoting=True, overwrite_a=True)[1][:budget].tolist()


def pivoted_cholesky(features: NDArray[np.float32], relevance: NDArray[np.float64], budget: int) -> list[int]:
    """GPyTorch's, on the kernel kept as a product of its root."""
    import torch
    from linear_operator.functions import pivoted_cholesky as factor
    from linear_operator.operators import RootLinearOperator

    root = torch.from_numpy(features * relevance[:, None]).double()
    return factor(RootLinearOperator(root), budget, error_tol=0.0, return_pivots=True)[1][:budget].tolist()


def submodlib_log_determinant(features: NDArray[np.float32], relevance: NDArray[np.float64], budget: int) -> list[int]:
    from submodlib import LogDeterminantFunction

    kernel = (features @ features.T).astype(np.float64) * relevance * relevance[:, None]
    function = LogDeterminantFunction(n=len(features), mode="dense", lambdaVal=0, sijs=kernel)
    return [row for row, _ in function.maximize(budget=budget, optimizer="LazyGreedy", stopIfNegativeGain=False)]


def submodlib_facility_location(
    features: NDArray[np.float32], relevance: NDArray[np.float64], budget: int
) -> list[int]:
    from submodlib import FacilityLocationFunction

    function = FacilityLocationFunction(n=len(features), mode="dense", data=features, metric="cosine")
    return [row for row, _ in function.maximize(budget=budget, optimizer="LazyGreedy")]


def apricot_facility_location(features: NDArray[np.float32], relevance: NDArray[np.float64], budget: int) -> list[int]:
    from apricot import FacilityLocationSelection

    chosen = FacilityLocationSelection(budget, metric="precomputed", optimizer="lazy")
    return chosen.fit(np.maximum(features @ features.T, 0.0)).ranking.tolist()


THEIRS = {
    "dense": (dense, 20_000, 380, "numpy"),
    "LAPACK pivoted QR": (lapack, 20_000, 380, "scipy"),
    "LAPACK pivoted QR, 200,000 rows": (lapack, 200_000, 380, "scipy"),
    "pivoted Cholesky (linear_operator)": (pivoted_cholesky, 20_000, 380, "linear_operator"),
    "log-determinant (submodlib)": (submodlib_log_determinant, 2_000, 100, "submodlib"),
    "facility location (submodlib)": (submodlib_facility_location, 5_000, 380, "submodlib"),
    "facility location (apricot)": (apricot_facility_location, 5_000, 380, "apricot"),
}
"""Name -> function, rows, picks, module that it needs. Those without relevance pick other rows than ours."""


def peak() -> int:
    """Return the most KiB that this process has held in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(method: str, rows: int, budget: int, epsilon: float) -> None:
    """Print seconds, MiB above the embeddings, and the picks, as JSON."""
    features, relevance = pool(rows)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: making the rows took more than picking
    before = peak()
    start = time.perf_counter()
    if method in THEIRS:
        picked, certificate = THEIRS[method][0](features, relevance, budget), 0
    else:
        picks = greedy_map(features, relevance, budget, epsilon=epsilon)
        picked, certificate = picks.rows.tolist(), certificate_size(relevance, picks, epsilon=epsilon)
    seconds = time.perf_counter() - start
    above = (peak() - before) / 1024
    print(json.dumps({"seconds": seconds, "mib": above, "picked": picked, "certificate": certificate}))


def measured(method: str, rows: int, budget: int, epsilon: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", method, str(rows), str(budget), str(epsilon)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of the selector.")
    parser.add_argument("--rows", type=int, nargs="*", default=[20_000, 1_000_000])
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        method, rows, budget, epsilon = options.one
        measure(method, int(rows), int(budget), float(epsilon))
        return
    for rows in options.rows:
        for budget, epsilon in BUDGETS:
            if budget < rows:
                ours = measured("ours", rows, budget, epsilon)
                print(
                    f"N {rows}, k {budget}, eps {epsilon}: {ours['seconds']:.2f} s, {ours['mib']:.0f} MiB, "
                    f"certificate {ours['certificate']} rows",
                    flush=True,
                )
    names = list(THEIRS) if options.peers else ["dense"] if options.dense else []
    for name in names:
        _, rows, budget, module = THEIRS[name]
        if importlib.util.find_spec(module) is None:
            print(f"{name}: {module} is not installed")
            continue
        ours, theirs = measured("ours", rows, budget, 0.0), measured(name, rows, budget, 0.0)
        times = theirs["seconds"] / ours["seconds"]
        print(
            f"N {rows}, k {budget}: {name} {times:.1f} x the time, {theirs['mib']:.0f} MiB "
            f"against {ours['mib']:.0f}; same picks: {ours['picked'] == theirs['picked']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
