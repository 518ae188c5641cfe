"""The table: held-out loss and accuracy of every method on every domain, and what the unified model keeps."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_moe.data import batches
from mergekit_moe.evaluation.judging import judge
from mergekit_moe.evaluation.metrics import Retention, RoutingAccuracy, TokenLoss, judged_by, what_is_lost
from mergekit_moe.evaluation.scoring import Domain, by_model, score, tokenized
from mergekit_moe.evaluation.tables import RESULTS
from mergekit_moe.models import load_expert, load_model, load_reader, recorded_routers, scored_inputs, shared_parameters
from mergekit_moe.recipe import Evaluation
from mergekit_moe.workspace import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mergekit_moe.matching import Labels

SEED, SOUP, OURS, OWN = "seed", "soup", "unified", "own expert"


def evaluate_models(
    base: Path,
    experts: dict[str, Path],
    unified: Path,
    domains: list[Domain],
    settings: Evaluation,
    *,
    proxy_shares: dict[str, dict[str, float]],
    labels: "Labels | None" = None,
    out: Path,
) -> None:
    """Write results.json to the folder `out`: the seed, each expert alone, the soup and the unified model.

    Args:
        experts: expert's name -> its published folder; each runs as PEFT or transformers would run it.
        unified: the unified model's folder.
        proxy_shares: how often each client's proxies carry its true tag, kept with the results.
        labels: those of all domains together, for an encoder; a domain is never judged by its own labels alone.
    """
    domains = tokenized(domains, load_reader(base), settings, labels.names if labels is not None else [])
    losses = {SEED: _losses(load_model(base, labels), domains, settings)}
    losses.update(_expert_losses(base, experts, domains, settings, labels))
    model = load_model(unified, labels).eval()
    losses[OURS] = _losses(model, domains, settings)
    losses[OWN] = {d.name: losses[d.name][d.name] for d in domains}
    results = {
        "domains": {d.name: {"rows": len(d.rows)} for d in domains},
        "methods": losses,
        "judged_by": judged_by(losses[SEED].values()),
        "retention": {m: _retention(losses, m, domains) for m in losses},
        "routing": {d.name: routing_accuracy(model, d, settings) for d in domains},
        "proxies": proxy_shares,
        "parameters": {"unified": sum(p.numel() for p in model.parameters())},
    }
    write_json(out / RESULTS, results)


@torch.no_grad()
def routing_accuracy(model: "PreTrainedModel", domain: Domain, settings: Evaluation) -> dict[str, Any]:
    """Return the share of a domain's tokens that go to its own expert, by layer and over all."""
    metric = RoutingAccuracy()
    with recorded_routers(model) as calls:
        for batch in batches(domain.rows, settings.batch_size, model.device):
            model(**scored_inputs(model, batch), use_cache=False)
            routed = calls[0].routing.token_mask
            for layer, call in enumerate(calls):
                hits = int((call.logits.argmax(-1)[routed] == domain.expert).sum())
                metric.add(prediction=[layer, hits], reference=int(routed.sum()))
    return metric.compute()


def _losses(model: "PreTrainedModel", domains: list[Domain], settings: Evaluation) -> dict[str, Any]:
    """Return each domain's mean loss in nats and its perplexity; where rows have labels, the accuracy, too."""
    results = {}
    for domain in domains:
        scores = score(by_model(model), domain.rows, settings, model.device)
        count = int(scores["predictions"])
        results[domain.name] = TokenLoss().compute(predictions=[scores["loss"] * count], references=[count])
        if "accuracy" in scores:
            results[domain.name]["accuracy"] = scores["accuracy"]
        if domain.questions is not None:
            results[domain.name] |= judge(model, domain.questions, settings)
    return results


@torch.no_grad()
def _expert_losses(
    base: Path, experts: dict[str, Path], domains: list[Domain], settings: Evaluation, labels: "Labels | None" = None
) -> dict[str, dict[str, Any]]:
    """Each expert alone, and the soup: the plain average of all their weights."""
    soup = load_model(base, labels)
    averaged = shared_parameters(soup)
    means = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in averaged.items()}
    results = {}
    for name, folder in experts.items():
        model = load_expert(base, folder, labels)
        results[name] = _losses(model, domains, settings)
        own = shared_parameters(model)
        for name in means.keys() & own.keys():  # a head that an expert unties has no place in the soup, nor in a merge
            means[name].add_(own[name], alpha=1.0 / len(experts))
    for name, parameter in averaged.items():
        parameter.copy_(means[name])
    return {**results, SOUP: _losses(soup, domains, settings)}


def _retention(losses: dict[str, Any], method: str, domains: list[Domain]) -> dict[str, Any]:
    """How much is kept of each expert's gain over the seed: in right answers, or in loss where not all give any."""
    metric = judged_by(losses[SEED].values())
    computed = Retention().compute(
        predictions=[what_is_lost(losses[method][d.name], metric) for d in domains],
        references=[[what_is_lost(losses[m][d.name], metric) for m in (SEED, OWN)] for d in domains],
    )
    each = dict(zip([d.name for d in domains], computed["retention"], strict=True))
    return {"by_domain": each, "mean": computed["mean_retention"]}
