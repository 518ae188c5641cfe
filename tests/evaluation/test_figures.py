"""Pictures of a comparison: what is drawn are the JSON's own numbers."""

import random
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from mergekit_moe.evaluation.figures import ACCENT, MINUS, draw_ablations, draw_retention, draw_routing, write_figures

DOMAINS, EXPERTS, LAYERS = ["code", "maths"], ["code", "maths", "anchor"], 4
METHODS = {
    "seed": ("seed", "reference", False),
    "soup": ("soup", "baseline", False),
    "btx": ("BTX", "baseline", True),
    "ours": ("MetaMoE (ours)", "ours", False),
    "ceiling": ("unrestricted", "ceiling", True),
    "no-context": ("without context", "ablation", False),
    "random": ("random proxies", "ablation", False),
}


def comparison(seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """Made-up numbers of the right shape, other ones for each method, seed and domain."""
    draw = random.Random(0)
    methods = {}
    for key, (label, group, private) in METHODS.items():
        runs = {}
        for seed in seeds:
            kept = {domain: draw.uniform(-0.2, 1) - 2.0 * (key == "random") for domain in DOMAINS}
            runs[str(seed)] = {"retention": {"by_domain": kept, "mean": fmean(kept.values())}}
            if group == "ours":
                runs[str(seed)]["routing"] = {domain: routed(draw) for domain in DOMAINS}
        methods[key] = {"label": label, "group": group, "private": private, "seeds": runs}
    return {"seeds": list(seeds), "domains": DOMAINS, "metric": "loss", "experts": EXPERTS, "methods": methods}


def routed(draw: random.Random) -> dict[str, Any]:
    loads = []
    for _ in range(LAYERS):
        raw = [draw.random() for _ in EXPERTS]
        loads.append([value / sum(raw) for value in raw])
    return {"accuracy": draw.random(), "load_by_layer": loads}


def kept(numbers: dict[str, Any], key: str, domain: str | None) -> list[float]:
    runs = numbers["methods"][key]["seeds"].values()
    return [r["retention"]["mean"] if domain is None else r["retention"]["by_domain"][domain] for r in runs]


def notes(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_heat_maps_hold_the_mean_share_of_each_expert_in_each_layer() -> None:
    numbers = comparison()
    panels = draw_routing(numbers).axes[: len(DOMAINS)]
    runs = [run["routing"] for run in numbers["methods"]["ours"]["seeds"].values()]
    assert [text.get_text() for text in panels[0].get_yticklabels()] == EXPERTS
    for axes, domain in zip(panels, DOMAINS, strict=True):
        shares = axes.images[0].get_array()
        assert shares.shape == (len(EXPERTS), LAYERS)
        for k in range(len(EXPERTS)):
            for layer in range(LAYERS):
                mean = fmean(run[domain]["load_by_layer"][layer][k] for run in runs)
                assert shares[k, layer] == pytest.approx(mean, abs=1e-12)
        right = fmean(run[domain]["accuracy"] for run in runs)
        assert axes.get_title() == f"{domain}\n{right:.1%} to its own expert"
        (frame,) = axes.patches
        assert frame.get_y() == EXPERTS.index(domain) - 0.5
        assert notes(axes)[0] == f"{shares[0, 0]:.2f}"[1:]


def test_bars_are_the_mean_retentions_best_first_with_their_spread() -> None:
    numbers = comparison()
    panels = draw_retention(numbers).axes
    assert [axes.get_title() for axes in panels] == ["mean of the domains", *DOMAINS]
    order = sorted(("seed", "soup", "btx", "ours"), key=lambda key: -fmean(kept(numbers, key, None)))
    labels = [METHODS[key][0] + ("*" if METHODS[key][2] else "") for key in order]
    assert [text.get_text() for text in panels[0].get_yticklabels()] == labels
    for axes, domain in zip(panels, (None, *DOMAINS), strict=True):
        values = [kept(numbers, key, domain) for key in order]
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([fmean(v) for v in values])
        assert notes(axes) == [f"{fmean(v):.2f}".replace("-", MINUS) for v in values]
        assert [to_hex(bar.get_facecolor()) == ACCENT for bar in axes.patches] == [key == "ours" for key in order]
        whiskers = [path.vertices[:, 0] for lines in axes.collections for path in lines.get_paths()]
        assert [b - a for a, b in whiskers] == pytest.approx([2 * stdev(v) for v in values])
        (ceiling,) = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert ceiling.get_xdata()[0] == pytest.approx(fmean(kept(numbers, "ceiling", domain)))


def test_one_seed_has_no_whiskers() -> None:
    for axes in draw_retention(comparison(seeds=(3,))).axes:
        assert not axes.collections


def test_an_expert_without_a_gain_is_said_to_leave_nothing_to_keep() -> None:
    numbers = comparison()
    for method in numbers["methods"].values():
        for run in method["seeds"].values():
            run["retention"]["by_domain"]["maths"] = None
    maths = draw_retention(numbers).axes[2]
    assert not maths.patches
    assert set(notes(maths)) == {"n/a"}


def test_ablations_are_compared_with_ours_seed_by_seed() -> None:
    numbers = comparison()
    (axes,) = draw_ablations(numbers).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["random proxies", "without context"]
    ours = kept(numbers, "ours", None)
    for row, key in enumerate(("random", "no-context")):
        differences = [a - b for a, b in zip(kept(numbers, key, None), ours, strict=True)]
        rings = axes.collections[2 * row].get_offsets()
        assert [[x, y] for x, y in rings] == [[pytest.approx(d), row] for d in differences]
        stated = f"{fmean(differences):+.3f} ± {stdev(differences):.3f}".replace("-", MINUS)
        assert notes(axes)[1 + row] == stated
        arrows = [line for line in axes.lines if line.get_marker() == "<" and line.get_ydata()[0] == row]
        assert len(arrows) == (fmean(differences) < -0.3)
    assert axes.get_xlim()[0] == -0.3  # `random` lies beyond


def test_files_are_the_same_bytes_each_time_and_only_what_there_are_numbers_for(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    paths = write_figures(comparison(), tmp_path)
    assert [path.name for path in paths] == ["retention.png", "routing.png", "ablations.png"]
    for path, again in zip(paths, write_figures(comparison(), tmp_path / "again"), strict=True):
        assert path.read_bytes() == again.read_bytes()
        assert path.read_bytes().startswith(b"\x89PNG")
    numbers = comparison()
    numbers["methods"] = {key: numbers["methods"][key] for key in ("seed", "ours")}
    for run in numbers["methods"]["ours"]["seeds"].values():
        del run["routing"]
    assert [path.name for path in write_figures(numbers, tmp_path / "again")] == ["retention.png"]


def test_before_anything_has_run_there_is_no_picture(tmp_path: Path) -> None:
    assert write_figures(comparison() | {"methods": {}, "domains": []}, tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_before_ours_has_run_there_are_bars_alone(tmp_path: Path) -> None:
    numbers = comparison()
    del numbers["methods"]["ours"]
    assert [path.name for path in write_figures(numbers, tmp_path)] == ["retention.png"]
