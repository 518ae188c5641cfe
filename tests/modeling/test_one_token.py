"""A step of generation takes short paths: they have to give what the general ones give."""

from collections.abc import Callable

import pytest
import torch
from conftest import tiny_moe, tokens
from transformers import PreTrainedModel

from mergekit_moe.modeling.dense_metamoe import DenseExperts
from mergekit_moe.modeling.experts_metamoe import MoeBlock

RANKS = {"an anchor": (2, 0, 3, 4), "dense ones too": (2, None, 3, None), "dense ones alone": (None, None, None)}


def steps(moe: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of `ids`, (1, T), token by token, (T, V)."""
    cache, given = None, []
    with torch.no_grad():
        for token in ids[0]:
            output = moe(token.reshape(1, 1), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            given.append(output.logits[0, -1])
    return torch.stack(given)


def counted(monkeypatch: pytest.MonkeyPatch, cls: type, name: str, calls: list[str]) -> None:
    method: Callable[..., torch.Tensor] = getattr(cls, name)

    def count(self: object, *args: object) -> torch.Tensor:
        calls.append(name)
        return method(self, *args)

    monkeypatch.setattr(cls, name, count)


@pytest.mark.parametrize("context", ["prefix", "none"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_short_paths_equal_the_general_ones(
    family: str, ranks: tuple[int | None, ...], top_k: int, context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one pass over all tokens with gradients, which takes none; BOS goes to no expert."""
    moe, ids = tiny_moe(family, ranks, num_experts_per_tok=top_k, router_context=context), tokens()[:1]
    calls: list[str] = []
    counted(monkeypatch, MoeBlock, "by_one_expert", calls)
    counted(monkeypatch, DenseExperts, "one_token", calls)
    whole = moe(ids).logits[0].detach()
    assert not calls
    torch.testing.assert_close(steps(moe, ids), whole, atol=1e-5, rtol=0)
    assert set(calls) == ({"one_token"} if None in ranks else {"by_one_expert"} if top_k == 1 else set())


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_short_paths_hold_under_autocast(ranks: tuple[int | None, ...]) -> None:
    moe, ids = tiny_moe("Llama", ranks, num_experts_per_tok=1 + (None in ranks)), tokens()[:1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = moe(ids).logits[0].detach()
        torch.testing.assert_close(steps(moe, ids), whole, atol=0.1, rtol=0)
