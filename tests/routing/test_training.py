"""Router training: what trains, what it trains on, and that training may not make things worse."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_moe, tokens
from datasets import Dataset

from mergekit_moe.models import recorded_routers, routers_of
from mergekit_moe.recipe import RouterTraining
from mergekit_moe.routing.training import best_scales, domain_loss, judge, train_routers


def proxies(rows: int = 24) -> Dataset:
    """Rows whose tokens tell their expert: each draws from a third of the vocabulary."""
    made = []
    for i in range(rows):
        ids = tokens(1, 12, seed=i)[0]
        ids[1:] = 2 + 30 * (i % 3) + ids[1:] % 30
        made.append({"input_ids": ids.tolist(), "labels": ids.tolist(), "expert": i % 3})
    return Dataset.from_list(made)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)], ids=["task", "domain", "both"])
def test_routers_change_at_top_1_and_nothing_else_does(tmp_path: Path, weights: tuple[float, float]) -> None:
    model = tiny_moe("Llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = RouterTraining(
        max_steps=3, batch_size=8, learning_rate=1e-2, task_weight=weights[0], domain_weight=weights[1]
    )
    train_routers(model, proxies(), settings, seed=0, folder=tmp_path)
    for name, tensor in model.state_dict().items():
        change = (tensor - before[name]).abs().max()
        if ".router." in name:
            assert change > 1e-4, name
        else:
            assert change == 0, name


def test_training_on_the_domain_teaches_the_routing(tmp_path: Path) -> None:
    model, rows = tiny_moe("Llama"), proxies()
    before = judge(model, rows)["routing_accuracy"]
    settings = RouterTraining(max_steps=200, batch_size=24, learning_rate=5e-2, task_weight=0.0)
    train_routers(model, rows, settings, seed=0, folder=tmp_path)
    assert judge(model, rows)["routing_accuracy"] > max(0.9, before)


def test_training_is_deterministic_given_the_seed(tmp_path: Path) -> None:
    states = []
    for _ in range(2):
        model = tiny_moe("Llama")
        train_routers(model, proxies(), RouterTraining(max_steps=4, batch_size=8), seed=3, folder=tmp_path)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_domain_loss_counts_routed_tokens_only_and_weighs_experts_alike() -> None:
    model, ids = tiny_moe("Llama"), tokens()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    owner = torch.tensor([2, 0])
    with recorded_routers(model) as calls, torch.no_grad():
        model(ids, attention_mask=mask)
        given = domain_loss(calls, owner)
        each = []
        for call in calls:
            long, short = call.logits[0, 1:].log_softmax(-1)[:, 2], call.logits[1, 1:6].log_softmax(-1)[:, 0]
            each.append(-(long.mean() + short.mean()) / 2)
    torch.testing.assert_close(given, torch.stack(each).mean())


def test_the_best_scale_is_the_best_of_all_tried() -> None:
    model, rows = tiny_moe("Llama"), proxies(9)
    with torch.no_grad():
        routers_of(model)[0].weight.mul_(100.0)

    def loss(factor: float) -> float:
        with recorded_routers(model) as calls, torch.no_grad():
            losses = []
            for row in rows:
                model(torch.tensor([row["input_ids"]]), forced_expert=torch.tensor([row["expert"]]))
                scaled = calls[0]._replace(logits=calls[0].logits * factor)
                losses.append(float(domain_loss([scaled], torch.tensor([row["expert"]]))))
        return sum(losses)

    losses = {2.0 ** (-i / 2): loss(2.0 ** (-i / 2)) for i in range(21)}
    assert best_scales(model, rows)[0] == min(losses, key=losses.__getitem__) < 1.0
