"""What a client can see of its proxies: numbers and pictures that stay in its own workspace.

Judged against top-k and random by private texts that the selection never saw. None of it is published.
Shapes: N pool rows, K rows picked, M held-out private rows, D embedding size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.selection.quality import coverage, squared_mmd
from mergekit_moe.workspace import write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIAGNOSTICS, CURVES, MAP, GAINS = "diagnostics.json", "curves.png", "map.png", "gains.png"
_POINTS = 8
"""Sizes of choice at which the curves are measured, doubling up to the budget."""
_MOST = 4_000
"""Pool rows that the map shows, drawn at random."""


def diagnose(
    pool_ND: NDArray[np.float32],
    picked_K: NDArray[np.int64],
    relevance_N: NDArray[np.float64],
    held_out_MD: NDArray[np.float32],
    *,
    seed: int,
) -> dict[str, Any]:
    """Return the numbers: MMD and coverage first, since they alone foretell how useful proxies are.

    Args:
        picked_K: rows in picking order, so that the first k are the choice at budget k (not so for k-means).
        held_out_MD: at least 2 unit embeddings of private texts that relevance wasn't fitted on.
    """
    order = {
        "selected": picked_K,
        "top-k": np.argsort(-relevance_N, kind="stable")[: len(picked_K)],
        "random": np.random.default_rng(seed).permutation(len(pool_ND))[: len(picked_K)],
    }
    sizes = sorted({max(1, len(picked_K) >> i) for i in range(_POINTS)})
    curves = {
        name: [
            {
                "proxies": size,
                "squared_mmd": round(squared_mmd(pool_ND[rows[:size]], held_out_MD), 6),
                "coverage": round(coverage(pool_ND[rows[:size]], held_out_MD), 4),
            }
            for size in sizes
        ]
        for name, rows in order.items()
    }
    picked = np.asarray(pool_ND[picked_K], dtype=np.float64)
    cosines = picked @ picked.T
    between = cosines[np.triu_indices(len(picked), 1)]
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {
        "held_out_texts": len(held_out_MD),
        "curves": curves,
        "distinct": len(np.unique(picked_K)),
        "relevance_of_pool": _quantiles(relevance_N, quantiles),
        "relevance_of_proxies": _quantiles(relevance_N[picked_K], quantiles),
        "cosine_between_proxies": _quantiles(between, quantiles) if len(between) else {},
        "vendi_score": round(vendi_score(cosines), 2),
        "most_typical": picked_K[np.argsort(-relevance_N[picked_K], kind="stable")[:5]].tolist(),
        "least_typical": picked_K[np.argsort(relevance_N[picked_K], kind="stable")[:5]].tolist(),
    }


def vendi_score(cosines_KK: NDArray[np.float64]) -> float:
    """Return the effective number of distinct rows: exp of the entropy of eigenvalues of cosines / K.

    Source: Friedman and Dieng 2023, Eq. 1. Random choices have the highest; it says nothing about relevance.
    """
    values = np.linalg.eigvalsh(cosines_KK / len(cosines_KK))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def write_diagnostics(
    pool_ND: NDArray[np.float32],
    picked_K: NDArray[np.int64],
    relevance_N: NDArray[np.float64],
    held_out_MD: NDArray[np.float32],
    texts: Sequence[str],
    *,
    gains_K: NDArray[np.float64] | None = None,
    draw_private: bool = False,
    seed: int,
    out: Path,
) -> None:
    """Write diagnostics.json, curves.png, map.png and, where the DPP picked, gains.png to the folder `out`.

    Args:
        texts: the pool's, N, or its images' ids; the most and the least typical proxies are quoted.
        gains_K: log gains of the picks.
        draw_private: True to show the held-out private texts on the map.
    """
    numbers = diagnose(pool_ND, picked_K, relevance_N, held_out_MD, seed=seed)
    for which in ("most_typical", "least_typical"):
        numbers[which] = [{"row": row, "text": texts[row][:200]} for row in numbers[which]]
    write_json(out / DIAGNOSTICS, numbers)
    _draw_curves(numbers["curves"], out / CURVES)
    _draw_map(pool_ND, picked_K, held_out_MD if draw_private else held_out_MD[:0], seed, out / MAP)
    if gains_K is not None:
        _draw_gains(gains_K, pool_ND.shape[1], out / GAINS)


def _quantiles(values: NDArray[np.float64], at: tuple[float, ...]) -> dict[str, float]:
    return {f"{q:.0%}": round(float(value), 4) for q, value in zip(at, np.quantile(values, at), strict=True)}


def _draw_curves(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, measure, title in (
        (left, "squared_mmd", "discrepancy from held-out private texts (MMD²): lower is better"),
        (right, "coverage", "mean best cosine from a held-out private text: higher is better"),
    ):
        for name, points in curves.items():
            axes.plot([p["proxies"] for p in points], [p[measure] for p in points], marker="o", label=name)
        axes.set_xscale("log")
        axes.set_xlabel("proxies")
        axes.set_title(title, fontsize=8)
    left.legend()
    _save(figure, path)


def _draw_gains(gains_K: NDArray[np.float64], size: int, path: Path) -> None:
    """Draw each pick's log gain; past the embeddings' rank nothing but the nugget tells rows apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes: Axes = figure.subplots()
    axes.plot(np.arange(1, len(gains_K) + 1), gains_K)
    if len(gains_K) > size:
        axes.axvline(size, color="lightgrey", label=f"rank of the embeddings: at most {size}")
        axes.legend()
    axes.set_xlabel("pick")
    axes.set_ylabel("log gain")
    _save(figure, path)


def _draw_map(
    pool_ND: NDArray[np.float32],
    picked_K: NDArray[np.int64],
    private_MD: NDArray[np.float32],
    seed: int,
    path: Path,
) -> None:
    """Draw pool, proxies and what is given of private texts on the pool's first two principal axes."""
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA

    some = np.random.default_rng(seed).permutation(len(pool_ND))[:_MOST]
    axes_2D = PCA(2, svd_solver="full").fit(pool_ND[some])
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes: Axes = figure.subplots()
    layers = [(pool_ND[some], 3, "lightgrey", "pool"), (pool_ND[picked_K], 6, "tab:blue", "proxies")]
    if len(private_MD):
        layers.append((private_MD, 6, "tab:orange", "client, held out"))
    for points, size, colour, label in layers:
        x, y = axes_2D.transform(points).T
        axes.scatter(x, y, s=size, color=colour, label=label)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    # No date or version in the file: the same selection gives the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
