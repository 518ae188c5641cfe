"""Router training: what trains, what it trains on, and that training may not make things worse."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import BOS, TINY, tiny_moe, tokens
from datasets import Dataset
from killing import Killed, kill_at
from safetensors.torch import load_file

from mergekit_moe.modeling.routing_metamoe import router_losses
from mergekit_moe.models import recorded_routers, routers_of
from mergekit_moe.router_recipe import Router, RouterTraining
from mergekit_moe.routing.ambiguity import own_shares, unambiguous
from mergekit_moe.routing.losses import balance_loss, domain_loss, z_loss
from mergekit_moe.routing.start import Material
from mergekit_moe.routing.training import best_factor, best_scales, judge, start_routers, train_routers


def proxies(rows: int = 24) -> Dataset:
    """Rows whose tokens tell their expert: each draws from a third of the vocabulary."""
    made = []
    for i in range(rows):
        ids = tokens(1, 12, seed=i)[0]
        ids[1:] = 2 + 30 * (i % 3) + ids[1:] % 30
        made.append({"input_ids": ids.tolist(), "labels": ids.tolist(), "expert": i % 3})
    return Dataset.from_list(made)


LOSSES = ("task_weight", "domain_weight", "balance_weight", "z_weight")


def only(loss: str) -> dict[str, float]:
    """Return the losses' weights: one for this one, and none for the others."""
    return {name: float(name == loss) for name in LOSSES}


def changed(model: Any, settings: RouterTraining, folder: Path) -> dict[str, float]:
    """Train, and return by how much each parameter changed that did."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_routers(model, proxies(), settings, seed=0, folder=folder)
    changes = {name: float((tensor - before[name]).abs().max()) for name, tensor in model.state_dict().items()}
    return {name: change for name, change in changes.items() if change > 0}


@pytest.mark.parametrize("loss", LOSSES)
def test_routers_change_at_top_1_by_each_loss_and_nothing_else_does(tmp_path: Path, loss: str) -> None:
    model = tiny_moe("Llama")
    found = changed(model, RouterTraining(max_steps=3, batch_size=8, learning_rate=1e-2, **only(loss)), tmp_path)
    assert found.keys() == {name for name in model.state_dict() if ".router." in name}
    assert min(found.values()) > 1e-4


@pytest.mark.parametrize("ranks", [(2, 4, 3), (None, None, None), (2, None, 0)], ids=["lora", "dense", "mixed"])
@pytest.mark.parametrize("trains", ["router", "router+experts"])
@pytest.mark.parametrize("learn_context", [True, False])
def test_exactly_what_is_asked_for_changes(
    tmp_path: Path, ranks: tuple[int | None, ...], trains: Any, learn_context: bool
) -> None:
    model = tiny_moe("Llama", ranks)
    settings = {"max_steps": 4, "batch_size": 24, "learning_rate": 1e-2, "domain_weight": 0.5}
    found = changed(model, RouterTraining(trains=trains, learn_context=learn_context, **settings), tmp_path)
    expected = {name for name in model.state_dict() if ".router." in name}
    if trains == "router+experts":
        expected |= {name for name in model.state_dict() if ".experts." in name}
    if not learn_context:
        expected -= {name for name in expected if name.endswith("context_logit")}
    assert found.keys() == expected


def gate_gradients(model: Any, loss: torch.Tensor, ending: str) -> list[float]:
    model.zero_grad()
    loss.backward()
    return [float(p.grad.norm()) for name, p in model.named_parameters() if name.endswith(ending)]


def test_at_top_1_the_task_reaches_our_routers_and_not_those_of_a_stock_mixtral() -> None:
    """The published trap: p / sum(p) is the constant 1, so that its gradient is rounding."""
    ids = tokens(8, 20)
    torch.manual_seed(0)
    stock = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TINY, num_local_experts=3, num_experts_per_tok=1)
    )
    for name, parameter in stock.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    gradients = gate_gradients(stock, stock(input_ids=ids, labels=ids).loss, "gate.weight")
    assert len(gradients) == 3
    assert max(gradients) < 1e-6
    ours = tiny_moe("Llama")
    assert min(gate_gradients(ours, ours(ids, labels=ids).loss, "router.weight")) > 1e-3


def test_each_loss_reaches_every_router_at_top_1() -> None:
    model, ids = tiny_moe("Llama"), tokens(8, 20)
    owner = torch.arange(8) % 3
    losses = {
        "domain": lambda calls, routed: domain_loss(calls, owner),
        "balance": lambda calls, routed: balance_loss(calls, 1, routed),
        "z": lambda calls, routed: z_loss(calls, routed),
    }
    for name, loss in losses.items():
        with recorded_routers(model) as calls:
            model(ids)
            value = loss(calls, (ids != BOS).sum())
        assert min(gate_gradients(model, value, "router.weight")) > 1e-3, name


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_and_z_are_the_models_own(top_k: int) -> None:
    model, ids = tiny_moe("Llama", num_experts_per_tok=top_k), tokens(3, 11)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with recorded_routers(model) as calls, torch.no_grad():
        model(ids, attention_mask=mask)
        routed = calls[0].routing.token_mask
        balance, z = router_losses(tuple(call.logits for call in calls), routed, top_k)
        torch.testing.assert_close(balance_loss(calls, top_k, routed.sum()), balance)
        torch.testing.assert_close(z_loss(calls, routed.sum()), z)


def trained(
    folder: Path, rows: Dataset, ranks: tuple[int, ...] = (2, 4, 3), **settings: Any
) -> dict[str, torch.Tensor]:
    """Return all parameters after a training of routers and experts."""
    model = tiny_moe("Llama", ranks)
    settings = {"trains": "router+experts", "learning_rate": 1e-2, **settings}
    train_routers(model, rows, RouterTraining(**settings), seed=3, folder=folder)
    return model.state_dict()


def test_two_micro_batches_of_four_are_one_batch_of_eight(tmp_path: Path) -> None:
    """All losses but the balance, which looks at a micro-batch at a time; rows of very different length."""
    rows = proxies()
    rows = rows.map(
        lambda row, i: {name: row[name][: 3 + i % 10] for name in ("input_ids", "labels")}, with_indices=True
    )
    settings = {"max_steps": 3, "z_weight": 0.1, "domain_weight": 0.7}
    whole = trained(tmp_path, rows, batch_size=8, **settings)
    parts = trained(tmp_path, rows, batch_size=4, gradient_accumulation=2, **settings)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("checkpoint", [1, 5, 8], ids=["early", "second-epoch", "after the last step"])
def test_a_killed_training_goes_on_and_ends_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: int
) -> None:
    settings = {"max_steps": 8, "batch_size": 6, "patience": 20}
    judges = {"judges": proxies(6)}
    states = []
    for killed in (False, True):
        folder, model = tmp_path / str(killed), tiny_moe("Llama")
        asked = RouterTraining(trains="router+experts", learning_rate=1e-2, **settings)
        run = functools.partial(train_routers, proxies=proxies(), settings=asked, seed=3, folder=folder, **judges)
        if killed:
            with monkeypatch.context() as patch, pytest.raises(Killed):
                kill_at(checkpoint, patch)
                run(model)
            kept = list((folder / "trainer").glob("checkpoint-*/trained.safetensors"))
            assert kept
            assert all("router" in name or "experts" in name for file in kept for name in load_file(file))
            torch.manual_seed(99)
            model = tiny_moe("Llama")
        states.append((model, run(model)))
        assert not (folder / "trainer").exists()
    (whole, log), (resumed, again) = states
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert [entry.get("loss") for entry in log] == [entry.get("loss") for entry in again]


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_steps": 6, "batch_size": 6}
    whole = trained(tmp_path / "whole", proxies(), **settings)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(3, patch)
        trained(tmp_path / "killed", proxies(), **settings)
    (state,) = (tmp_path / "killed").rglob("trainer_state.json")
    state.write_text(state.read_text()[:100])
    resumed = trained(tmp_path / "killed", proxies(), **settings)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_without_patience_left_training_stops_and_the_best_is_kept(tmp_path: Path) -> None:
    """Judged by text of another kind, which is read the worse the longer the training lasts."""
    model = tiny_moe("Llama")
    judges = Dataset.from_list([{"input_ids": x, "labels": x, "expert": 0} for x in tokens(6, 12, seed=5).tolist()])
    settings = RouterTraining(max_steps=60, batch_size=8, learning_rate=0.05, patience=2, trains="router+experts")
    log = train_routers(model, proxies(), settings, seed=0, folder=tmp_path, judges=judges)
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert 3 <= len(losses) < 20
    assert losses.index(min(losses)) == len(losses) - 3
    assert judge(model, judges)["loss"] == pytest.approx(min(losses), abs=1e-6)


@pytest.mark.parametrize("ranks", [(2, 4, 3), (None, None, None)], ids=["lora", "dense"])
def test_experts_stored_at_16_bits_train_in_float32(tmp_path: Path, ranks: tuple[int | None, ...]) -> None:
    """At this rate a step in bfloat16 would change nothing: it is less than half of the weights' last bit."""
    model = tiny_moe("Llama", ranks).to(torch.bfloat16)
    for router in routers_of(model):
        router.float()
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    experts = {n: t.clone() for n, t in model.state_dict().items() if ".experts." in n}
    settings = RouterTraining(max_steps=30, batch_size=8, trains="router+experts", bf16=True, scheduler="constant")
    log = train_routers(model, proxies(), settings, seed=0, folder=tmp_path)
    assert kinds == {name: tensor.dtype for name, tensor in model.state_dict().items()}
    moved = {n: float((model.state_dict()[n] != t).double().mean()) for n, t in experts.items()}
    assert min(moved.values()) > 0.1
    assert log[-1]["loss"] < log[0]["loss"]


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

    losses = {2.0 ** (i / 2): loss(2.0 ** (i / 2)) for i in range(-20, 21)}
    assert best_scales(model, rows)[0] == min(losses, key=losses.__getitem__) < 1.0


@pytest.mark.parametrize("right", [True, False])
def test_routers_are_surer_where_the_task_has_them_so_and_never_less_sure(right: bool) -> None:
    """Where the first expert says what the rows say, it is taken alone; where the mean does, they stay as they are."""
    model = tiny_moe("Llama", num_experts_per_tok=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    writer = surer(model, 1e4 if right else 1e-4)
    rows = proxies(9).map(lambda row: {"labels": said_by(writer, row["input_ids"])})
    losses = {2.0**i: summed_loss(surer(model, 2.0**i), rows) for i in range(-4, 9)}
    found, wanted = best_factor(model, rows), min(losses, key=losses.__getitem__)
    assert wanted > 1 if right else wanted < 1
    assert found == max(wanted, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("start", ["lda", "ridge"])
def test_a_start_with_several_experts_a_token_is_as_sure_as_the_task_has_it(start: str) -> None:
    """Ridge's numbers lie between 0 and 1: alone, it would be sure of nothing."""
    model, rows = tiny_moe("Llama", num_experts_per_tok=2), proxies(30)
    start_routers(Material(model, rows, Router(start=start, training=None), 0, {}, None, []))
    assert best_factor(model, rows) == 1.0
    assert all(scale <= 1.0 for scale in best_scales(model, rows)), "for the domain alone they are sure enough"


def surer(model: Any, factor: float) -> Any:
    """Return a copy of the model with routers `factor` times as sure."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for router in routers_of(other):
            router.weight.mul_(factor)
            router.bias.mul_(factor)
    return other


@torch.no_grad()
def said_by(model: Any, ids: list[int]) -> list[int]:
    """Return what a model would have after each token: text that it reads better than anybody who differs from it."""
    return [ids[0], *model(torch.tensor([ids])).logits[0, :-1].argmax(-1).tolist()]


@torch.no_grad()
def summed_loss(model: Any, rows: Dataset) -> float:
    """Return the loss over all rows, one at a time."""
    total = 0.0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum"))
    return total


def mistaken(rows: int = 60) -> Dataset:
    """Proxies of which expert 0 picked four that are like expert 1's."""
    made = proxies(rows).to_list()
    for place in (1, 7, 13, 19):
        made[place]["expert"] = 0
    return Dataset.from_list(made)


def test_proxies_that_are_like_another_expert_s_are_left_out_of_the_fit() -> None:
    """The routers are those of a fit that never saw these rows; row by row, each goes where a plain look says."""
    rows, settings = mistaken(), Router(shrinkage=0.5, leave_out_ambiguous=True)
    model = tiny_moe("Llama")
    start_routers(Material(model, rows, settings.model_copy(update={"leave_out_ambiguous": False}), 0, {}, None, []))
    kept, shares = unambiguous(model, rows), own_shares(model, rows)
    for row, share in zip(rows, shares, strict=True):
        with recorded_routers(model) as calls, torch.no_grad():
            model(torch.tensor([row["input_ids"]]), use_cache=False)
        own = [float((call.logits[0, 1:].argmax(-1) == row["expert"]).float().mean()) for call in calls]
        assert float(share) == pytest.approx(sum(own) / len(own), abs=1e-6)
    assert kept == [row for row, share in enumerate(shares) if share >= 0.5]
    assert not {1, 7, 13, 19} & set(kept) and len(kept) > 45
    again, without = tiny_moe("Llama"), tiny_moe("Llama")
    fitted_on = start_routers(Material(again, rows, settings, 0, {}, None, []))
    start_routers(Material(without, rows.select(kept), Router(shrinkage=0.5), 0, {}, None, []))
    assert fitted_on[:] == rows.select(kept)[:]
    for one, other in zip(routers_of(again), routers_of(without), strict=True):
        assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def test_an_expert_like_another_keeps_half_of_its_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = proxies(9)
    shares = torch.tensor([0.1, 0.9, 0.2, 0.3, 0.8, 0.1, 0.2, 0.7, 0.6])
    monkeypatch.setattr("mergekit_moe.routing.ambiguity.own_shares", lambda model, proxies: shares)
    assert unambiguous(tiny_moe("Llama"), rows) == [1, 2, 3, 4, 6, 7, 8]
