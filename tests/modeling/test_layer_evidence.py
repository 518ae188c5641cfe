"""Routers that add to their logits those of all layers before them."""

import copy
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import ENCODERS, tiny_moe, tokens
from test_encoders import inputs, states
from test_modeling import logits
from transformers import StaticCache

from mergekit_moe.models import recorded_routers, routers_of


def adding(family: str, **settings: Any) -> Any:
    return tiny_moe(family, router_adds_layers=True, **settings)


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Gemma2", *ENCODERS])
def test_a_layers_logits_are_the_sum_of_what_all_so_far_have_said(family: str) -> None:
    moe = adding(family)
    given = inputs(family) if family in ENCODERS else {"input_ids": tokens()}
    for _ in range(2):  # a second pass knows nothing of the first
        with recorded_routers(moe) as calls:
            moe(**given)
        alone = [
            router.blend(call.hidden, call.routing, None) for router, call in zip(routers_of(moe), calls, strict=True)
        ]
        added = torch.stack(alone).double().cumsum(0)
        assert (added[-1] - alone[-1]).abs().max() > 0.1
        for call, expected in zip(calls, added, strict=True):
            torch.testing.assert_close(call.logits.double(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_it_decodes_as_it_reads(family: str) -> None:
    moe, ids = adding(family), tokens(3, 12)
    together = logits(moe, ids)
    cache, parts = None, []
    for first, last in ((0, 5), (5, 6), (6, 12)):
        output = moe(ids[:, first:last], past_key_values=cache, use_cache=True)
        cache, parts = output.past_key_values, [*parts, output.logits]
    torch.testing.assert_close(torch.cat(parts, 1), together, atol=1e-5, rtol=0)
    for row in range(3):
        torch.testing.assert_close(logits(moe, ids[row : row + 1]), together[row : row + 1], atol=1e-5, rtol=0)
    packed = logits(moe, ids.reshape(1, -1), position_ids=torch.arange(12).repeat(3)[None], use_cache=False)
    torch.testing.assert_close(packed.reshape(3, 12, -1), together, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_encoders_row_is_the_same_alone(encoder: str) -> None:
    moe, given = adding(encoder), inputs(encoder, 3)
    together = states(moe, **given)
    for row in range(3):
        alone = states(moe, **{name: value[row : row + 1] for name, value in given.items()})
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_layer_that_runs_again_finds_what_it_found(family: str, use_reentrant: bool) -> None:
    plain, ids = adding(family).train(), tokens()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in (plain, checkpointed):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-7, rtol=1e-5, msg=name)


def test_each_router_learns_from_its_own_layers_choice() -> None:
    """The sum's gradient stops at the layer's own logits: a loss on the last layer's leaves the first router alone."""
    moe = adding("Llama").train()
    with recorded_routers(moe) as calls:
        moe(tokens(), forced_expert=torch.tensor([0, 1]))
    calls[-1].logits.square().sum().backward()
    first, *_, last = routers_of(moe)
    assert last.weight.grad.abs().max() > 1e-3
    assert not first.weight.grad.any()


@torch.no_grad()
def test_it_survives_tools_that_move_each_layers_inputs() -> None:
    moe, ids = adding("Llama"), tokens()
    expected = logits(moe, ids)
    for layer in moe.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(torch.device("cpu"), io_same_device=True))
    assert torch.equal(logits(moe, ids), expected)


@torch.no_grad()
def test_a_step_compiles_into_one_graph() -> None:
    moe, ids = adding("Llama"), tokens(2, 9)
    cache = StaticCache(config=moe.config, max_cache_len=16)
    moe(ids[:, :8], past_key_values=cache, use_cache=True)
    torch.compiler.reset()
    step = torch.compile(moe.forward, fullgraph=True, backend="eager")
    given = step(input_ids=ids[:, 8:], past_key_values=cache, position_ids=torch.full((2, 1), 8), use_cache=True)
    torch.testing.assert_close(given.logits, logits(moe, ids)[:, 8:], atol=1e-5, rtol=0)
