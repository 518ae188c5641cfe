"""Router logits and losses as options, against independent references; what can't work is refused by name."""

import pytest
import torch
from conftest import BOS, tiny_moe, tokens

from mergekit_moe.modeling import config_class, model_class


def test_router_logits_come_layer_by_layer_on_request(family: str) -> None:
    moe = tiny_moe(family)
    assert getattr(moe(tokens()), "router_logits", None) is None
    outputs = moe(tokens(), output_router_logits=True)
    assert [logits.shape for logits in outputs.router_logits] == [(2, 9, 3)] * 3
    assert torch.equal(outputs.logits, moe(tokens()).logits)


@pytest.mark.parametrize("top_k", [1, 2])
def test_losses_equal_their_definitions(top_k: int) -> None:
    """Float64: Switch's balance (experts times the sum of share times probability) and ST-MoE's z loss."""
    moe = tiny_moe("Llama", num_experts_per_tok=top_k, router_aux_loss_coef=0.3, router_z_loss_coef=0.07)
    ids = tokens(3, 11, seed=4)
    outputs = moe(ids, labels=ids, output_router_logits=True)
    routed = (ids != BOS).flatten()
    logits = torch.cat([layer.flatten(0, 1)[routed] for layer in outputs.router_logits]).double()
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, logits.topk(top_k).indices, 1.0)
    balance = 3 * (chosen.mean(0) * probabilities.mean(0)).sum()
    z = logits.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(outputs.aux_loss.double(), balance, atol=1e-6, rtol=1e-6)
    task = moe(ids, labels=ids).loss
    torch.testing.assert_close(outputs.loss.double(), (task + 0.3 * balance + 0.07 * z).double(), atol=1e-5, rtol=1e-5)


def test_each_loss_reaches_the_routers_alone_of_all_new_parameters() -> None:
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        moe = tiny_moe("Llama", **{name: 1.0})
        outputs = moe(tokens(), labels=tokens(), output_router_logits=True)
        (outputs.loss - moe(tokens(), labels=tokens()).loss).backward()
        last = moe.model.layers[-1].mlp
        assert last.router.weight.grad.abs().max() > 1e-6
        assert last.experts["up_proj"].lora_A.grad.abs().max() < 1e-6


def test_the_config_can_ask_for_losses_and_tuples_keep_their_order() -> None:
    moe = tiny_moe("Llama", output_router_logits=True, router_z_loss_coef=0.5)
    outputs = moe(tokens(), labels=tokens())
    assert outputs.router_logits is not None
    given = moe(tokens(), labels=tokens(), return_dict=False)
    assert isinstance(given, tuple)
    assert torch.equal(given[0], outputs.loss)


def test_continuous_batching_is_refused_while_there_is_context() -> None:
    moe = tiny_moe("Llama")
    with pytest.raises(ValueError, match="continuous batching can't carry the router's context"):
        moe.model(tokens(), cache=object())
    with pytest.raises(ValueError, match="continuous batching"):
        moe.init_continuous_batching()


def test_a_family_without_a_known_ffn_is_refused_with_the_place_to_add_it() -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
    config = config_class("Mixtral")(**tiny, num_attention_heads=4, num_key_value_heads=2, experts=[{"name": "a"}])
    with pytest.raises(ValueError, match=r"FORMS of experts_metamoe\.py"):
        model_class("Mixtral", "ForCausalLM")(config)
    with pytest.raises(ValueError, match="transformers has no GPT2ForCausalLM"):
        model_class("GPT2", "ForCausalLM")


def test_layers_keep_their_native_names_for_wrapping_policies(family: str) -> None:
    moe = tiny_moe(family)
    names = {type(module).__name__ for module in moe.modules()}
    assert set(moe._no_split_modules) <= names
