"""What a method says of held-out rows, and how well: one seam for one model and for several that vote.

Shapes: B rows, T tokens, N judged predictions, V what each chooses from (the vocabulary), K models.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mergekit_moe.data import IGNORED, batches, read_in, tokenize
from mergekit_moe.errors import DataError
from mergekit_moe.evaluation.judging import Questions, judge
from mergekit_moe.models import recorded_routers, routers_of, scored_inputs
from mergekit_moe.task_recipe import Choices, Generation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from mergekit_moe.recipe import Evaluation


class Judged(NamedTuple):
    """Predictions that have a right answer."""

    log_probs: Tensor
    """(N, V), float32."""
    targets: Tensor
    """(N,)"""
    rows: Tensor
    """(N,) the batch's row that each belongs to."""


Predict = Callable[[dict[str, Tensor]], Judged]
"""From a collated batch to what a method predicts in it."""


class Domain(NamedTuple):
    """Held-out rows of one expert's domain."""

    expert: int
    """The expert's number in the unified model."""
    name: str
    rows: "Dataset"
    task: Choices | Generation | None = None
    questions: Questions | None = None
    """What they are judged by beside the loss, once they are tokens."""


def tokenized(domains: list[Domain], reader: Any, settings: "Evaluation", names: Sequence[str] = ()) -> list[Domain]:
    """Return the domains with the rows that are judged, tokenised, and their questions.

    Args:
        names: labels of all domains together, where rows have labels.

    Raises:
        DataError: if a domain has none, naming its expert.
    """
    found = []
    for domain in domains:
        first = domain.rows.select(range(min(len(domain.rows), settings.max_rows)))
        rows = tokenize(first, reader, settings.max_length, names)
        if len(rows) == 0:
            raise DataError(
                f"expert '{domain.name}': no held-out row has a token to judge within evaluation.max_length "
                f"{settings.max_length}; raise it"
            )
        questions = None if domain.task is None else Questions(first, domain.task, reader)
        found.append(domain._replace(rows=rows, questions=questions))
    return found


@torch.no_grad()
def judged(model: "PreTrainedModel", batch: dict[str, Tensor]) -> Judged:
    """Return a language model's predictions of the tokens that are to be learnt, row by row, from left to right.

    Of an encoder, its choice of a label for each row.
    """
    logits, labels = model(**scored_inputs(model, batch), use_cache=False).logits, batch["labels"]
    if labels.ndim == 1:
        return Judged(logits.float().log_softmax(-1), labels, torch.arange(len(labels), device=labels.device))
    logits, labels = logits[:, :-1], labels[:, 1:]
    rows, places = (labels != IGNORED).nonzero(as_tuple=True)
    return Judged(logits[rows, places].float().log_softmax(-1), labels[rows, places], rows)


def by_model(model: "PreTrainedModel") -> Predict:
    model.eval()
    return functools.partial(judged, model)


def by_vote(models: list["PreTrainedModel"]) -> Predict:
    """The experts' mean probability (BTM, Li et al. 2022, with uniform weights)."""

    def predict(batch: dict[str, Tensor]) -> Judged:
        said = [judged(model.eval(), batch) for model in models]
        return said[0]._replace(log_probs=_mixed([one.log_probs for one in said], 1.0 / len(said)))

    return predict


def by_posterior(models: list["PreTrainedModel"]) -> Predict:
    """The experts' probabilities, each weighed by how well it has read the row so far (BTM, Li et al. 2022, Eq. 2).

    A token's weights are the posterior of the domains, given the tokens before it and equal priors.
    """

    def predict(batch: dict[str, Tensor]) -> Judged:
        learnt = batch["labels"][:, 1:] != IGNORED
        read = batch["attention_mask"][:, 1:].bool()
        all_of_it = torch.where(batch["attention_mask"].bool(), batch["input_ids"], IGNORED)
        said = [judged(model.eval(), {**batch, "labels": all_of_it}) for model in models]
        own = torch.zeros(len(models), *read.shape, device=read.device)
        for k, one in enumerate(said):
            own[k][read] = one.log_probs.gather(-1, one.targets[:, None])[:, 0]
        before = own.cumsum(-1) - own
        weights_KN = before.softmax(0)[:, learnt]
        kept = learnt[read]
        mixed = _mixed([one.log_probs[kept] for one in said], weights_KN[:, :, None])
        return Judged(mixed, said[0].targets[kept], said[0].rows[kept])

    return predict


def _mixed(log_probs: list[Tensor], weights: Any) -> Tensor:
    stacked = torch.stack(log_probs)
    return (stacked + torch.as_tensor(weights, device=stacked.device).log()).logsumexp(0)


def score(predict: Predict, rows: "Dataset", settings: "Evaluation", device: Any) -> dict[str, float]:
    """Return the mean loss in nats a prediction, `predictions`, and the input's `tokens` (or images) and `seconds`.

    Where rows have labels, their `accuracy`, too.
    """
    total = predictions = right = tokens = seconds = 0.0
    for batch in batches(rows, settings.batch_size, device):
        begun = time.perf_counter()
        said = predict(batch)
        own = said.log_probs.gather(-1, said.targets[:, None]).cpu().double()  # on the CPU: Apple's have no float64
        total -= float(own.sum())
        seconds += time.perf_counter() - begun
        predictions += len(own)
        right += int((said.log_probs.argmax(-1) == said.targets).sum())
        tokens += read_in(batch)
    accuracy = {"accuracy": right / predictions} if batch["labels"].ndim == 1 else {}
    return {"loss": total / predictions, **accuracy, "predictions": predictions, "tokens": tokens, "seconds": seconds}


def losses_of(predict: Predict, settings: "Evaluation", device: Any, rows: "Dataset") -> list[float]:
    """Return each row's summed loss in nats."""
    sums: list[float] = []
    for batch in batches(rows, settings.batch_size, device):
        said = predict(batch)
        own = said.log_probs.gather(-1, said.targets[:, None])[:, 0].cpu().double()
        sums += own.new_zeros(len(batch["labels"])).index_add(0, said.rows.cpu(), -own).tolist()
    return sums


@torch.no_grad()
def routing_of(model: "PreTrainedModel", domain: Domain, settings: "Evaluation") -> dict[str, Any]:
    """Return where a domain's tokens go: `load_by_layer` (L, K), and the shares that reach their own expert first.

    Of several experts a token, each is counted, whatever its weight.
    """
    top_k, count = model.config.num_experts_per_tok, model.config.num_experts
    layers = len(routers_of(model))
    load_LK = torch.zeros(layers, count, dtype=torch.float64)
    own_L = torch.zeros(layers, dtype=torch.float64)
    with recorded_routers(model.eval()) as calls:
        for batch in batches(domain.rows, settings.batch_size, model.device):
            model(**scored_inputs(model, batch), use_cache=False)
            routed = calls[0].routing.token_mask
            for layer, call in enumerate(calls):
                chosen = call.logits[routed].topk(top_k).indices.cpu()
                load_LK[layer] += torch.bincount(chosen.flatten(), minlength=count)
                own_L[layer] += (chosen[:, 0] == domain.expert).sum()
    tokens = load_LK[0].sum() / top_k
    load_LK, own_L = load_LK / (tokens * top_k), own_L / tokens
    return {
        "accuracy": float(own_L.mean()),
        "accuracy_by_layer": own_L.tolist(),
        "load_by_layer": load_LK.tolist(),
    }


def measure(
    predict: Predict, models: list[Any], domains: list[Domain], strangers: list[Domain], settings: "Evaluation"
) -> dict[str, Any]:
    """Return a method's scores by domain and by stranger, its speed, and where its routers send each domain.

    Args:
        models: those behind `predict`; routers are looked at where it is one.
        strangers: text of no expert's domain.
    """
    device = models[0].device
    scores = {domain.name: score(predict, domain.rows, settings, device) for domain in domains}
    for domain in domains:
        if domain.questions is not None:
            losses = None if len(models) == 1 else functools.partial(losses_of, predict, settings, device)
            scores[domain.name] |= judge(models[0], domain.questions, settings, losses=losses)
    tokens, seconds = (sum(one[key] for one in scores.values()) for key in ("tokens", "seconds"))
    found = {
        "domains": scores,
        "strangers": {domain.name: score(predict, domain.rows, settings, device) for domain in strangers},
        "tokens_per_second": tokens / seconds,
    }
    if len(models) == 1 and routers_of(models[0]):
        found["routing"] = {domain.name: routing_of(models[0], domain, settings) for domain in domains}
    return found
