"""Choices between given answers: a model's is the one that it finds most likely."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mergekit_moe.data import IGNORED, leading_tokens
from mergekit_moe.errors import DataError
from mergekit_moe.evaluation.losses import row_losses
from mergekit_moe.recipe import Evaluation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


Losses = Callable[["Dataset"], list[float]]
"""From tokenised rows to the summed loss of each."""


def judge_choices(
    model: "PreTrainedModel", tokenizer: Any, rows: "Dataset", settings: Evaluation, *, losses: Losses | None = None
) -> dict[str, float]:
    """Return `accuracy` and `accuracy_normalised`: the share of rows whose likeliest completion is the right one.

    Normalised is by the log-likelihood a character, white space at a completion's ends not counted: what
    lm-evaluation-harness calls `acc_norm`; plain is its `acc`. Of equally likely ones the first is taken.

    Args:
        rows: with `prompt`, `completions` and `right`.
        losses: of who is judged, where it is not `model` alone.
    """
    likelihoods = choice_likelihoods(model, tokenizer, rows, settings, losses=losses)
    hits = normalised_hits = 0
    for row, of_row in zip(rows, likelihoods, strict=True):
        lengths = [len(completion.strip()) for completion in row["completions"]]
        hits += _first_best(of_row) == row["right"]
        normalised_hits += _first_best([total / n for total, n in zip(of_row, lengths, strict=True)]) == row["right"]
    return {"accuracy": hits / len(rows), "accuracy_normalised": normalised_hits / len(rows)}


def choice_likelihoods(
    model: "PreTrainedModel", tokenizer: Any, rows: "Dataset", settings: Evaluation, *, losses: Losses | None = None
) -> list[list[float]]:
    """Return each row's log-likelihoods, one a completion, in nats, given its prompt; EOS isn't asked for.

    Raises:
        DataError: if a completion alone is longer than `settings.max_length`, or there is nothing before it.
    """
    from datasets import Dataset

    encoded = [
        encode_choice(tokenizer, row["prompt"], completion, settings.max_length)
        for row in rows
        for completion in row["completions"]
    ]
    # Long ones first: rows of a batch are of like length, and what doesn't fit into memory fails at once.
    order = sorted(range(len(encoded)), key=lambda place: -len(encoded[place]["input_ids"]))
    ordered = Dataset.from_list([encoded[place] for place in order])
    summed = row_losses(model, ordered, settings.batch_size)[0] if losses is None else losses(ordered)
    found = dict(zip(order, summed, strict=True))
    likelihoods = iter(-found[place] for place in range(len(encoded)))
    return [[next(likelihoods) for _ in row["completions"]] for row in rows]


def encode_choice(tokenizer: Any, prompt: str, completion: str, max_length: int) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` as in training: BOS, prompt (masked), completion.

    A prompt that is too long loses its beginning, but for BOS; a completion stays whole.
    """
    bos = leading_tokens(tokenizer)
    given = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    asked = tokenizer(completion, add_special_tokens=False)["input_ids"]
    room = max_length - len(bos) - len(asked)
    context = bos + given[max(len(given) - room, 0) :]
    if room < 0 or not context:
        raise DataError(
            f"evaluation: a choice of {len(asked)} tokens needs something before it, and evaluation.max_length is "
            f"{max_length}; raise it, or give a longer prompt"
        )
    return {"input_ids": context + asked, "labels": [IGNORED] * len(context) + asked}


def _first_best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
