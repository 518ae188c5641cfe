"""Votes by the formula in float64, one token at a time; scores and loads against the model's own words."""

import math

import pytest
import torch
from conftest import tiny_dense, tiny_moe, tokens
from datasets import Dataset

from mergekit_moe.data import IGNORED
from mergekit_moe.evaluation.scoring import (
    Domain,
    by_model,
    by_posterior,
    by_vote,
    losses_of,
    measure,
    routing_of,
    score,
)
from mergekit_moe.models import recorded_routers
from mergekit_moe.recipe import Evaluation

SETTINGS = Evaluation(batch_size=3)


def rows(prompt: int = 2) -> Dataset:
    made = []
    for i in range(5):
        ids = tokens(1, 4 + i, seed=i)[0].tolist()
        made.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return Dataset.from_list(made)


def probabilities(models: list[torch.nn.Module], ids: list[int]) -> list[torch.Tensor]:
    """Return each model's next-token probabilities after each token, float64 (T, V)."""
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].double().softmax(-1) for model in models]


@pytest.mark.parametrize("by", ["vote", "posterior"])
def test_experts_vote_as_bayes_has_it(by: str) -> None:
    models = [tiny_dense(seed=seed).eval() for seed in (1, 2, 3)]
    total, count = 0.0, 0
    for row in rows():
        ids, said = row["input_ids"], probabilities(models, row["input_ids"])
        evidence = [1.0] * len(models)
        for t in range(1, len(ids)):
            own = [float(p[t - 1, ids[t]]) for p in said]
            weights = evidence if by == "posterior" else [1.0] * len(models)
            if row["labels"][t] != IGNORED:
                total -= math.log(sum(w * p for w, p in zip(weights, own, strict=True)) / sum(weights))
                count += 1
            evidence = [e * p for e, p in zip(evidence, own, strict=True)]
    predict = (by_vote if by == "vote" else by_posterior)(models)
    found = score(predict, rows(), SETTINGS, "cpu")
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found["predictions"] == count


@pytest.mark.parametrize("by", ["vote", "posterior"])
def test_a_vote_s_loss_of_each_row_is_its_own(by: str) -> None:
    """Row by row, whatever shares its batch; their sum is that of `score`."""
    models = [tiny_dense(seed=seed).eval() for seed in (1, 2)]
    predict = (by_vote if by == "vote" else by_posterior)(models)
    together = losses_of(predict, SETTINGS, "cpu", rows())
    alone = [losses_of(predict, SETTINGS, "cpu", rows().select([i]))[0] for i in range(len(rows()))]
    assert together == pytest.approx(alone, abs=1e-4)
    found = score(predict, rows(), SETTINGS, "cpu")
    assert sum(together) == pytest.approx(found["loss"] * found["predictions"], rel=1e-6)


def test_a_vote_of_one_is_that_one() -> None:
    model = tiny_dense(seed=4)
    alone = score(by_model(model), rows(), SETTINGS, "cpu")["loss"]
    for by in (by_vote, by_posterior):
        assert score(by([model]), rows(), SETTINGS, "cpu")["loss"] == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_loads_are_the_shares_of_tokens_that_each_expert_gets(top_k: int) -> None:
    model = tiny_moe("Llama", num_experts_per_tok=top_k)
    found = routing_of(model, Domain(1, "law", rows()), SETTINGS)
    loads = torch.zeros(len(found["load_by_layer"]), len(found["load_by_layer"][0]))
    first = torch.zeros(len(loads))
    tokens = 0
    with recorded_routers(model) as calls, torch.no_grad():
        for row in rows():
            model(torch.tensor([row["input_ids"]]))
            tokens += len(row["input_ids"]) - 1
            for layer, call in enumerate(calls):
                for logits in call.logits[0, 1:].tolist():
                    order = sorted(range(len(logits)), key=lambda expert: -logits[expert])
                    first[layer] += order[0] == 1
                    for expert in order[:top_k]:
                        loads[layer, expert] += 1 / top_k
    torch.testing.assert_close(torch.tensor(found["load_by_layer"]), loads / tokens)
    assert found["accuracy_by_layer"] == pytest.approx((first / tokens).tolist())
    assert found["accuracy"] == pytest.approx(float((first / tokens).mean()))


def test_only_a_model_with_routers_is_asked_for_its_routing() -> None:
    domain = Domain(0, "law", rows())
    dense, moe = tiny_dense(seed=1), tiny_moe("Llama")
    assert "routing" not in measure(by_model(dense), [dense], [domain], [], SETTINGS)
    found = measure(by_model(moe), [moe], [domain], [domain._replace(name="nobody")], SETTINGS)
    assert found["routing"].keys() == {"law"}
    assert found["strangers"]["nobody"]["loss"] == found["domains"]["law"]["loss"]
    assert found["tokens_per_second"] > 0
