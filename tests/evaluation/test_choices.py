"""Choices against brute force: one row at a time, in float64."""

import copy
import functools
import math
import random
from typing import Any

import pytest
import torch
from datasets import Dataset
from task_models import MODELS, TOKENIZER, sentences, tiny

from mergekit_moe.errors import DataError
from mergekit_moe.evaluation.choices import choice_likelihoods, encode_choice, judge_choices
from mergekit_moe.evaluation.scoring import by_vote, losses_of
from mergekit_moe.recipe import Evaluation


def questions(count: int = 12, seed: int = 0) -> Dataset:
    draw = random.Random(seed)
    rows = []
    for i, prompt in enumerate(sentences(count, seed)):
        completions = [f" {text}" for text in sentences(2 + i % 3, seed + 100 + i, longest=4)]
        rows.append({"prompt": prompt, "completions": completions, "right": draw.randrange(len(completions))})
    return Dataset.from_list(rows)


@torch.no_grad()
def brute_force(model: Any, prompt: str, completion: str) -> float:
    """The definition: the sum over the completion's tokens of their log-probabilities, given all before them."""
    given = TOKENIZER(prompt)["input_ids"]
    ids = torch.tensor([given + TOKENIZER(completion, add_special_tokens=False)["input_ids"]])
    inputs = {}
    if getattr(model.config, "router_context", None) == "prompt":
        inputs["prompt_mask"] = (torch.arange(ids.shape[1]) < len(given)).long()[None]
    logs = model(ids, **inputs).logits[0].double().log_softmax(-1)
    return sum(float(logs[place - 1, ids[0, place]]) for place in range(len(given), ids.shape[1]))


@torch.no_grad()
def mean_of_tokens(models: list[Any], prompt: str, completion: str) -> float:
    """The log of the product, over the completion's tokens, of the models' mean probability."""
    given = TOKENIZER(prompt)["input_ids"]
    ids = torch.tensor([given + TOKENIZER(completion, add_special_tokens=False)["input_ids"]])
    said = sum(model(ids).logits[0].double().softmax(-1) for model in models) / len(models)
    return sum(math.log(float(said[place - 1, ids[0, place]])) for place in range(len(given), ids.shape[1]))


@pytest.mark.parametrize("kind", MODELS)
def test_the_choice_is_the_likeliest_completion_by_brute_force(kind: str) -> None:
    rows = questions()
    model = tiny(kind)
    found = choice_likelihoods(model, TOKENIZER, rows, Evaluation(batch_size=5))
    judged = judge_choices(model, TOKENIZER, rows, Evaluation(batch_size=5))
    model.double()
    plain = normalised = 0
    for row, likelihoods in zip(rows, found, strict=True):
        expected = [brute_force(model, row["prompt"], completion) for completion in row["completions"]]
        assert likelihoods == pytest.approx(expected, abs=1e-4)
        by_character = [e / len(c.strip()) for e, c in zip(expected, row["completions"], strict=True)]
        plain += expected.index(max(expected)) == row["right"]
        normalised += by_character.index(max(by_character)) == row["right"]
    assert judged == {"accuracy": plain / len(rows), "accuracy_normalised": normalised / len(rows)}


def test_several_models_choose_by_their_mean_probability_of_each_token() -> None:
    rows, models = questions(), [tiny("dense"), tiny("dense", seed=5)]
    losses = functools.partial(losses_of, by_vote(models), Evaluation(batch_size=4), "cpu")
    found = judge_choices(models[0], TOKENIZER, rows, Evaluation(), losses=losses)
    for model in models:
        model.double()
    right = 0
    for row in rows:
        said = [mean_of_tokens(models, row["prompt"], completion) for completion in row["completions"]]
        right += said.index(max(said)) == row["right"]
    assert found["accuracy"] == right / len(rows)


@pytest.mark.parametrize("kind", ["dense", "prompt"])
def test_batches_and_order_make_no_difference(kind: str) -> None:
    rows, model = questions(), tiny(kind)
    alone = choice_likelihoods(model, TOKENIZER, rows, Evaluation(batch_size=1))
    together = choice_likelihoods(model, TOKENIZER, rows, Evaluation(batch_size=16))
    turned = choice_likelihoods(model, TOKENIZER, rows.select(range(11, -1, -1)), Evaluation(batch_size=16))
    for one, all_, last in zip(alone, together, turned[::-1], strict=True):
        assert all_ == pytest.approx(one, abs=1e-4)
        assert last == pytest.approx(one, abs=1e-4)


def test_length_decides_only_where_it_is_divided_by() -> None:
    """The longer of two completions is less likely in all and more likely a character."""
    model, short, long = tiny("dense"), " dog", " dog dog dog dog dog dog dog dog"
    with torch.no_grad():
        model.lm_head.weight.zero_()  # each token as likely as any other
    tokens = [len(TOKENIZER(text, add_special_tokens=False)["input_ids"]) for text in (short, long)]
    assert tokens[0] / len(short.strip()) > tokens[1] / len(long.strip())
    rows = Dataset.from_list([{"prompt": "fox", "completions": [short, long], "right": 0}])
    judged = judge_choices(model, TOKENIZER, rows, Evaluation())
    assert judged == {"accuracy": 1.0, "accuracy_normalised": 0.0}


def test_a_long_prompt_loses_its_beginning_and_a_choice_nothing() -> None:
    prompt, completion = "fox " * 40, " lazy dog"
    whole = encode_choice(TOKENIZER, prompt, completion, 400)
    cut = encode_choice(TOKENIZER, prompt, completion, 20)
    assert cut["input_ids"] == whole["input_ids"][:1] + whole["input_ids"][-19:]
    assert cut["labels"][1:] == whole["labels"][-19:]
    with pytest.raises(DataError, match="max_length is 16; raise it"):
        encode_choice(TOKENIZER, prompt, completion * 20, 16)


def test_without_bos_a_choice_needs_a_token_of_its_prompt_before_it() -> None:
    """Nothing predicts a row's first token: a choice that filled the row alone would lose it."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_bos_token = False
    tokenizer._tokenizer.post_processor = None
    assert tokenizer("fox")["input_ids"] == TOKENIZER("fox", add_special_tokens=False)["input_ids"]
    asked = tokenizer(" lazy dog")["input_ids"]
    row = encode_choice(tokenizer, "quick fox", " lazy dog", len(asked) + 1)
    assert row["labels"][1:] == asked
    with pytest.raises(DataError, match=f"max_length is {len(asked)}; raise it"):
        encode_choice(tokenizer, "quick fox", " lazy dog", len(asked))
