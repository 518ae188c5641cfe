"""Results as people read them: rows for a terminal, Markdown for a card."""

from typing import Any

RESULTS = "results.json"
"""Where `evaluate` leaves what these tables show."""
_LABELS = {
    "seed": "seed",
    "soup": "soup (plain average)",
    "unified": "**unified (ours)**",
    "own expert": "own expert alone",
}


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _retention(results: dict[str, Any]) -> str:
    return "retention" if results["judged_by"] == "loss" else "retention (accuracy)"


def loss_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows): each method's held-out loss in nats on each domain, and its mean retention."""
    domains = list(results["domains"])
    header = ["method", *domains, f"mean {_retention(results)}"]
    rows = []
    for method, losses in results["methods"].items():
        mean = results["retention"][method]["mean"]
        label = _LABELS.get(method, f"expert {method}")
        rows.append([label, *(f"{losses[d]['loss']:.4f}" for d in domains), _share(mean)])
    return header, rows


def accuracy_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows): each method's accuracy on each domain that has labels or a task; no row where none has."""
    columns = [
        (domain, measure)
        for domain, judged in results["methods"]["unified"].items()
        for measure in ("accuracy", "accuracy_normalised")
        if measure in judged
    ]
    header = ["method", *(domain + (" (by length)" if m.endswith("d") else "") for domain, m in columns)]
    if not columns:
        return header, []
    rows = [
        [_LABELS.get(method, f"expert {method}"), *(_share(judged[domain][measure]) for domain, measure in columns)]
        for method, judged in results["methods"].items()
    ]
    return header, rows


def domain_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows): what the unified model keeps of each domain's expert, and where its tokens go."""
    header = ["domain", _retention(results), "routing acc.", "lowest layer", "ppl seed", "ppl expert", "ppl unified"]
    rows = []
    for domain in results["domains"]:
        routing = results["routing"][domain]
        rows.append(
            [
                domain,
                _share(results["retention"]["unified"]["by_domain"][domain]),
                f"{routing['routing_accuracy']:.3f}",
                f"{min(routing['routing_accuracy_by_layer']):.3f}",
                *(f"{results['methods'][m][domain]['perplexity']:.2f}" for m in ("seed", "own expert", "unified")),
            ]
        )
    return header, rows


def proxy_rows(shares: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows): how often each client's proxies carry its true tag, against top-k and random."""
    header = ["client", "selected", "top-k by relevance", "random"]
    return header, [
        [name, *(f"{share[m]:.2f}" for m in ("selected", "top-k", "random"))] for name, share in shares.items()
    ]


def all_rows(results: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Return title -> (header, rows) of all tables that there are numbers for."""
    found = {"held-out loss, in nats": loss_rows(results), "unified model": domain_rows(results)}
    if (accuracies := accuracy_rows(results))[1]:
        found["held-out accuracy"] = accuracies
    if results["proxies"]:
        found["share of proxies with the client's true tag"] = proxy_rows(results["proxies"])
    return found


def unified_metrics(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the unified model's own numbers, domain -> metric -> value, rounded as the tables are."""
    found = {}
    for domain, losses in results["methods"]["unified"].items():
        routing = results["routing"][domain]["routing_accuracy"]
        found[domain] = {
            "loss": round(losses["loss"], 4),
            "perplexity": round(losses["perplexity"], 2),
            "routing_accuracy": round(routing, 3),
            **{m: round(losses[m], 3) for m in ("accuracy", "accuracy_normalised") if m in losses},
        }
    return found


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, nothing for no row; numbers are right-aligned."""
    if not rows:
        return ""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
