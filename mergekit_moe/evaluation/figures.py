"""Pictures of a comparison: where tokens go, what each method keeps, what each part of ours is worth.

They read `comparison.json` and nothing else. One accent for ours and greys for the rest can be told apart by anybody,
in print too, and every bar states its number.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ACCENT, PLAIN, DARK = "#c44e00", "#b4b4b4", "#333333"
MINUS = "\N{MINUS SIGN}"
_STYLE: Any = {  # matplotlib's type of it names every key that there is
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": DARK,
    "ytick.major.size": 0,
    "ytick.major.pad": 6,
    "legend.frameon": False,
}
_WIDTH = 7.0
"""Inches: the text of a page."""
_LOWEST_RETENTION, _LOWEST_DIFFERENCE = -0.5, -0.3
"""Where an axis ends at the latest: a method far worse than the rest would flatten them. An arrow says what is cut."""
_MOST_WRITTEN = 8
"""Layers up to which the cells of a heat map state their share."""


@rc_context(_STYLE)
def draw_routing(comparison: dict[str, Any]) -> Figure:
    """Return heat maps of our routers, a panel a domain: the share of its tokens that each expert gets in each layer.

    Mean over seeds. The domain's own expert is framed; the title says how much it gets over all layers.
    """
    domains, experts = comparison["domains"], comparison["experts"]
    runs = [run["routing"] for run in _ours(comparison)["seeds"].values()]
    figure = Figure(figsize=(_WIDTH, 1.0 + 0.24 * len(experts)), layout="constrained")
    panels = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
    for axes, domain in zip(panels, domains, strict=True):
        image = _draw_heat_map(axes, [run[domain]["load_by_layer"] for run in runs], experts.index(domain))
        right = fmean(run[domain]["accuracy"] for run in runs)
        axes.set_title(f"{domain}\n{right:.1%} to its own expert")
    panels[0].set_yticks(range(len(experts)), experts)
    panels[0].set_ylabel("expert")
    figure.colorbar(image, ax=panels, label="share of tokens", ticks=[0, 0.5, 1], aspect=12, pad=0.01)
    return figure


@rc_context(_STYLE)
def draw_retention(comparison: dict[str, Any]) -> Figure:
    """Return bars of what each method keeps, best first: a panel for the mean, and one for each domain.

    Mean over seeds, whiskers of one standard deviation. Ceilings are dashed lines; ablations have their own picture.
    """
    methods = _of_groups(comparison, "reference", "baseline", "ours")
    methods.sort(key=lambda method: _mean(_retentions(method, None).values()), reverse=True)
    ceilings = _of_groups(comparison, "ceiling")
    domains = [None, *comparison["domains"]]
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.2 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(domains), sharex=True, sharey=True)
    for axes, domain in zip(panels, domains, strict=True):
        _draw_bars(axes, methods, domain)
        axes.set_title("mean of the domains" if domain is None else domain)
        for ceiling in ceilings:
            if kept := _retentions(ceiling, domain).values():
                axes.axvline(_mean(kept), color=DARK, linestyle="--", linewidth=1, zorder=0, label=_label(ceiling))
    _cut(panels[0], _LOWEST_RETENTION)
    panels[0].set_yticks(range(len(methods)), [_label(method) for method in methods])
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    for text, method in zip(panels[0].get_yticklabels(), methods, strict=True):
        if method["group"] == "ours":
            text.set(color=ACCENT, fontweight="bold")
    what = f"retention: share of the experts' gain in {comparison['metric']} that is kept, {_over_seeds(comparison)}"
    pooled = "; * has seen private rows of all clients" if any(m["private"] for m in methods + ceilings) else ""
    figure.supxlabel(what + pooled, fontsize=7.5)
    if ceilings:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(ceilings))
    return figure


@rc_context(_STYLE)
def draw_ablations(comparison: dict[str, Any]) -> Figure:
    """Return each ablation's mean retention less ours, the dearest first; a seed is compared with itself.

    Dots are means over seeds, whiskers one standard deviation, rings the seeds.
    """
    ours = _retentions(_ours(comparison), None)
    found = []
    for method in _of_groups(comparison, "ablation"):
        if differences := [kept - ours[seed] for seed, kept in _retentions(method, None).items() if seed in ours]:
            found.append((_label(method), differences))
    found.sort(key=lambda each: _mean(each[1]))
    figure = Figure(figsize=(0.66 * _WIDTH, 0.8 + 0.24 * len(found)), layout="constrained")
    axes: Axes = figure.subplots()
    axes.axvline(0, color=ACCENT, linewidth=1.2, zorder=0)
    over_line = axes.get_xaxis_transform()
    axes.text(0, 1.03, _label(_ours(comparison)), transform=over_line, ha="center", color=ACCENT, fontweight="bold")
    for row, (_, differences) in enumerate(found):
        axes.scatter(differences, [row] * len(differences), s=16, facecolors="none", edgecolors=PLAIN)
        mean, spread = _mean(differences), _spread(differences)
        axes.plot([0, mean], [row, row], color=PLAIN, linewidth=1, zorder=0)
        axes.errorbar(mean, row, xerr=spread, fmt="o", color=DARK, markersize=4, capsize=2)
        _state(axes, row, mean, f"{mean:+.3f}" + (f" ± {spread:.3f}" if spread else ""), lowest=_LOWEST_DIFFERENCE)
    axes.set_yticks(range(len(found)), [label for label, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    _cut(axes, _LOWEST_DIFFERENCE)
    axes.set_xlabel(f"mean retention, less ours ({_over_seeds(comparison)})")
    return figure


def write_figures(comparison: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures that a comparison has numbers for as PNG files; return their paths."""
    drawn = {"retention.png": draw_retention} if comparison["methods"] else {}
    ours = _of_groups(comparison, "ours")  # may not have run yet: methods can be run one by one
    if ours and all("routing" in run for run in ours[0]["seeds"].values()):
        drawn["routing.png"] = draw_routing
    if ours and _of_groups(comparison, "ablation"):
        drawn["ablations.png"] = draw_ablations
    for name, draw in drawn.items():
        # No date or version in the file: the same comparison gives the same bytes.
        draw(comparison).savefig(folder / name, dpi=200, metadata={"Software": None})
    return [folder / name for name in drawn]


def _of_groups(comparison: dict[str, Any], *groups: str) -> list[dict[str, Any]]:
    return [method for method in comparison["methods"].values() if method["group"] in groups]


def _ours(comparison: dict[str, Any]) -> dict[str, Any]:
    return _of_groups(comparison, "ours")[0]


def _retentions(method: dict[str, Any], domain: str | None) -> dict[str, float]:
    """Return a method's retention of a domain (None: their mean) by seed, without seeds that have none."""
    found = {}
    for seed, run in method["seeds"].items():
        kept = run["retention"]["mean"] if domain is None else run["retention"]["by_domain"].get(domain)
        if kept is not None:
            found[seed] = kept
    return found


def _mean(values: Iterable[float]) -> float:
    return fmean(given) if (given := list(values)) else -math.inf


def _spread(values: Iterable[float]) -> float:
    """Return the standard deviation over seeds; one alone has none."""
    return stdev(given) if len(given := list(values)) > 1 else 0.0


def _label(method: dict[str, Any]) -> str:
    return method["label"] + ("*" if method["private"] else "")


def _over_seeds(comparison: dict[str, Any]) -> str:
    count = len(comparison["seeds"])
    return f"mean ± std of {count} seeds" if count > 1 else "one seed"


def _draw_heat_map(axes: Axes, loads: list[list[list[float]]], own: int) -> Any:
    """Draw expert by layer, the mean of `loads` (seeds, layers, experts) over seeds; frame the expert `own`."""
    shares = np.mean(loads, axis=0).T
    layers = range(shares.shape[1])
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(ticks := layers[:: 1 + len(layers) // 9], [str(layer + 1) for layer in ticks])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    corner = (-0.5, own - 0.5)
    axes.add_patch(Rectangle(corner, len(layers), 1, fill=False, edgecolor=ACCENT, linewidth=1.6, clip_on=False))
    for (k, layer), share in np.ndenumerate(shares) if len(layers) <= _MOST_WRITTEN else ():
        # As papers print shares: no zero before the point.
        text = f"{share:.2f}".removeprefix("0") if share < 0.995 else "1"
        axes.text(layer, k, text, ha="center", va="center", fontsize=6, color="white" if share > 0.6 else DARK)
    return image


def _draw_bars(axes: Axes, methods: list[dict[str, Any]], domain: str | None) -> None:
    """Draw one bar a method, its whisker and its number."""
    axes.axvline(0, color=DARK, linewidth=0.8)
    for row, method in enumerate(methods):
        kept = _retentions(method, domain).values()
        if not kept:  # the domain's own expert gained nothing that could be kept
            _state(axes, row, 0.0, "n/a")
            continue
        is_ours = method["group"] == "ours"
        mean, spread = _mean(kept), _spread(kept)
        axes.barh(row, mean, height=0.7, color=ACCENT if is_ours else PLAIN)
        if spread:
            axes.errorbar(mean, row, xerr=spread, color=DARK, linewidth=0.8, capsize=1.5)
        _state(axes, row, mean, f"{mean:.2f}", weight="bold" if is_ours else "normal")


def _state(
    axes: Axes, row: int, mean: float, text: str, *, lowest: float = _LOWEST_RETENTION, weight: str = "normal"
) -> None:
    """Write a row's number beside the axes, where nothing that is drawn can cross it."""
    places = ("axes fraction", "data")
    axes.annotate(text.replace("-", MINUS), (1.02, row), xycoords=places, va="center", fontsize=7, fontweight=weight)
    if mean < lowest:
        axes.plot(lowest, row, marker="<", color=DARK, markersize=4, clip_on=False)


def _cut(axes: Axes, lowest: float) -> None:
    axes.set_xlim(left=max(axes.get_xlim()[0], lowest))
