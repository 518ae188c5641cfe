"""A comparison as people read it: what is kept of each expert, mean and spread over random seeds, in one table."""

import math
import statistics
from pathlib import Path
from typing import Any

from mergekit_moe.evaluation.metrics import Retention, judged_by, what_is_lost
from mergekit_moe.evaluation.tables import markdown

ORACLE = "oracle"
TABLE = "comparison.md"
GROUPS = {"Methods": ("reference", "baseline", "ours", "ceiling"), "Ablations": ("ours", "ablation")}
"""Title of a table -> the groups of methods that it shows."""
_ON_A_TERMINAL = ("average", "retention", "routing acc.", "runs")


def assemble(methods: dict[str, Any], experts: list[str]) -> dict[str, Any]:
    """Return the comparison: the methods' results, with the oracle's and each one's retention put in.

    Retention is on the loss, or on the accuracy where all domains' rows have labels or a task.

    Args:
        methods: name -> `label`, `group`, `private` and `seeds`: random seed -> result, where there is one.
        experts: the unified model's, in their order.
    """
    seeds = {seed for method in methods.values() for seed in method["seeds"]}
    results = [result for method in methods.values() for result in method["seeds"].values()]
    domains = list(results[0]["domains"]) if results else []
    metric = judged_by(results[0]["domains"].values()) if results else "loss"
    for seed in seeds:
        alone = {d: methods.get(f"expert-{d}", {"seeds": {}})["seeds"].get(seed) for d in domains}
        if all(alone.values()):
            own = {d: result["domains"][d] for d, result in alone.items()}
            methods[ORACLE]["seeds"][seed] = {"domains": own}
    for method in methods.values():
        for seed, result in method["seeds"].items():
            references = result.get("references") or {
                name: methods[name]["seeds"][seed]["domains"]
                for name in ("seed", *(f"expert-{d}" for d in domains))
                if seed in methods[name]["seeds"]
            }
            result["retention"] = _retention(result["domains"], references, metric)
    return {
        "seeds": sorted(map(int, seeds)),
        "domains": domains,
        "metric": metric,
        "experts": experts,
        "methods": {name: method for name, method in methods.items() if method["seeds"]},
    }


def _retention(scores: dict[str, Any], references: dict[str, Any], metric: str) -> dict[str, Any]:
    """Return what is kept of each domain and of all; None where it isn't known: a vote writes no answers."""
    known = {
        domain: [references[name][domain] for name in ("seed", f"expert-{domain}")]
        for domain, score in scores.items()
        if metric in score and "seed" in references and f"expert-{domain}" in references
    }
    computed = (
        Retention().compute(
            predictions=[what_is_lost(scores[domain], metric) for domain in known],
            references=[[what_is_lost(one, metric) for one in pair] for pair in known.values()],
        )
        if known
        else {"retention": [], "mean_retention": None}
    )
    kept = dict(zip(known, computed["retention"], strict=True))
    mean = computed["mean_retention"] if len(known) == len(scores) else None
    return {"by_domain": {domain: kept.get(domain) for domain in scores}, "mean": mean}


def comparison_rows(comparison: dict[str, Any], groups: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of the methods of some groups; each number is a mean over random seeds, and its spread."""
    domains, metric = comparison["domains"], comparison["metric"]
    strangers = sorted({name for r in _results(comparison) for name in r.get("strangers", {})})
    unit = "accuracy" if metric == "accuracy" else "nats a token"
    header = [f"{unit}", *domains, "average", "retention", "routing acc."]
    header += [f"{name}: loss over seed's" for name in strangers] + ["speed", "unify, s", "trained", "runs"]
    rows = []
    for method in comparison["methods"].values():
        if method["group"] not in groups:
            continue
        results = list(method["seeds"].values())
        over = [(result, _of_seed(comparison, seed)) for seed, result in method["seeds"].items()]
        row = [f"**{method['label']}**" if method["group"] == "ours" else method["label"]]
        row += [_spread([r["domains"][domain].get(metric) for r in results]) for domain in domains]
        row.append(_spread([_average(r, domains, metric) for r in results]))
        row.append(_spread([r["retention"]["mean"] for r in results]))
        row.append(_spread([_routing(r) for r in results]))
        row += [_spread([_worse(r, seed, name) for r, seed in over], percent=True) for name in strangers]
        row.append(_spread([_speed(r, seed) for r, seed in over], digits=2, alone=True))
        row.append(_spread([sum(r["seconds"].values()) if "seconds" in r else None for r in results], digits=0))
        row.append(f"{max(r.get('trainable_parameters', 0) for r in results):,}")
        row.append(str(len(results)))
        rows.append(row)
    return header, rows


def for_a_terminal(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Return the columns of a table that 80 characters have room for."""
    kept = [0, *(place for place, title in enumerate(header) if title in _ON_A_TERMINAL)]
    return [header[place] for place in kept], [[row[place] for place in kept] for row in rows]


def write_tables(comparison: dict[str, Any], out: Path) -> None:
    """Write the tables as Markdown to the folder `out`."""
    parts = []
    for title, groups in GROUPS.items():
        header, rows = comparison_rows(comparison, groups)
        parts.append(f"## {title}\n\n{markdown(header, rows)}\n")
    seeds = ", ".join(map(str, comparison["seeds"]))
    parts.append(
        f"Random seeds {seeds}: mean and standard deviation (n - 1). Speed is over the seed's in the same run.\n"
    )
    (out / TABLE).write_text("\n".join(parts), encoding="utf-8")


def _results(comparison: dict[str, Any]) -> list[Any]:
    return [result for method in comparison["methods"].values() for result in method["seeds"].values()]


def _average(result: dict[str, Any], domains: list[str], metric: str) -> float | None:
    """Return the mean over all domains; None where one has none: a vote writes no answers."""
    scores = [result["domains"][domain].get(metric) for domain in domains]
    return None if None in scores else statistics.fmean(scores)


def _routing(result: dict[str, Any]) -> float | None:
    return statistics.fmean(r["accuracy"] for r in result["routing"].values()) if "routing" in result else None


def _of_seed(comparison: dict[str, Any], seed: str) -> Any:
    return comparison["methods"].get("seed", {"seeds": {}})["seeds"].get(seed)


def _worse(result: dict[str, Any], seed: Any, stranger: str) -> float | None:
    """Return by how many per cent a stranger's loss is above the seed's."""
    if seed is None or stranger not in result.get("strangers", {}):
        return None
    return 100.0 * (result["strangers"][stranger]["loss"] / seed["strangers"][stranger]["loss"] - 1.0)


def _speed(result: dict[str, Any], seed: Any) -> float | None:
    if seed is None or "tokens_per_second" not in result:
        return None
    return result["tokens_per_second"] / seed["tokens_per_second"]


def _spread(values: list[float | None], *, digits: int = 3, percent: bool = False, alone: bool = False) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "-"
    mean = statistics.fmean(known)
    if percent:
        return f"{mean:+.1f}%"
    if len(known) == 1 or alone:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(known):.{digits}f}"
