"""The model class, over every family: exact experts, causal context, caches, gradients."""

import copy
import inspect

import pytest
import torch
from conftest import BOS, FFN, PAD, PROJECTIONS, tiny_dense, tiny_moe, tokens
from transformers import PreTrainedModel

from mergekit_moe.architectures import ARCHITECTURES
from mergekit_moe.modeling import FAMILIES
from mergekit_moe.modeling.experts_metamoe import BlockCall, MoeBlock
from mergekit_moe.modeling.routing_metamoe import LayerEvidence, Routing, expert_weights
from mergekit_moe.models import recorded_routers, routers_of


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return model(ids, **kwargs).logits


def fold(moe: PreTrainedModel, family: str, expert: int) -> PreTrainedModel:
    """Return the dense model whose FFNs carry one expert's difference, folded in float64."""
    dense = tiny_dense(family)
    state = without_experts(moe)
    for block, module in blocks_of(moe):
        for projection in FFN.get(family, PROJECTIONS):
            down, up = module.experts[projection.replace(".", "_")].factors(expert)
            delta = up.double().T @ down.double()
            key = f"{block}.{projection}.weight"
            state[key] = (state[key].double() + moe.config.experts[expert]["scale"] * delta).float()
    dense.load_state_dict(state)
    return dense


def without_experts(moe: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {k: v for k, v in moe.state_dict().items() if ".router." not in k and ".experts." not in k}


def blocks_of(moe: PreTrainedModel) -> list[tuple[str, MoeBlock]]:
    return [(name, module) for name, module in moe.named_modules() if isinstance(module, MoeBlock)]


def test_families_that_can_be_merged_are_tested_here() -> None:
    assert {(a.class_prefix, model_type) for model_type, a in ARCHITECTURES.items()} <= set(FAMILIES.items())


def test_a_pinned_expert_is_exactly_the_dense_expert(family: str) -> None:
    moe, ids = tiny_moe(family, router_excluded_token_ids=[]), tokens()
    for expert in range(3):
        pinned = logits(moe, ids, forced_expert=torch.tensor([expert, expert]))
        torch.testing.assert_close(pinned, logits(fold(moe, family, expert), ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_identical_experts_reproduce_the_dense_expert(family: str, top_k: int) -> None:
    moe = tiny_moe(family, (4, 4, 4), num_experts_per_tok=top_k, router_excluded_token_ids=[])
    for _, block in blocks_of(moe):
        for low_rank in block.experts.values():
            for matrix in (low_rank.lora_A, low_rank.lora_B):
                matrix.data = matrix.data[:4].repeat(3, 1)
    torch.testing.assert_close(logits(moe, tokens()), logits(fold(moe, family, 0), tokens()), atol=1e-5, rtol=0)


def test_experts_without_difference_reproduce_the_seed(family: str) -> None:
    moe = tiny_moe(family, (0, 0))
    dense = tiny_dense(family)
    dense.load_state_dict(without_experts(moe))
    assert torch.equal(logits(moe, tokens()), logits(dense, tokens()))


@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_mixes_whole_ffns(top_k: int) -> None:
    """Against the definition: sum of weight times the expert's own FFN, one expert at a time, float64."""
    moe = tiny_moe("Llama", num_experts_per_tok=top_k).double()
    block, hidden = moe.model.layers[1].mlp, torch.randn(2, 5, 32, dtype=torch.float64)
    routing = _routing(torch.tensor([[True, True, True, False, True]] * 2))
    block.call = BlockCall(routing, None, norm_follows=False)
    given = block(hidden)
    weights, indices = expert_weights(block.router(hidden, routing), routing, top_k, True)
    expected = torch.zeros_like(given)
    for expert in range(3):

        def project(name: str, x: torch.Tensor, expert: int = expert) -> torch.Tensor:
            down, up = block.experts[name].factors(expert)
            return x @ (getattr(block, name).weight + moe.config.experts[expert]["scale"] * up.T @ down).T

        ffn = project("down_proj", torch.nn.functional.silu(project("gate_proj", hidden)) * project("up_proj", hidden))
        expected += ffn * (weights.double() * (indices == expert)).sum(-1, keepdim=True)
    seeds = block.down_proj(block.act_fn(block.gate_proj(hidden)) * block.up_proj(hidden))
    expected = torch.where(routing.token_mask.unsqueeze(-1), expected, seeds)
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("renormalise", [True, False])
def test_grouped_and_side_by_side_are_the_same(
    family: str, top_k: int, renormalise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In values and in gradients, with an anchor among the experts and tokens that no expert takes."""
    moe = tiny_moe(family, (2, 0, 3, 4), num_experts_per_tok=top_k, norm_topk_prob=renormalise)
    given = []
    for grouped in (True, False):
        monkeypatch.setattr(MoeBlock, "groups_pay", lambda block, hidden, grouped=grouped: grouped)
        moe.zero_grad()
        moe(tokens(), labels=tokens()).loss.backward()
        gradients = {name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}
        given.append((logits(moe, tokens()), gradients))
    (values, gradients), (other_values, other_gradients) = given
    torch.testing.assert_close(values, other_values, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients, other_gradients, atol=1e-5, rtol=1e-4)


def test_changing_the_end_leaves_earlier_logits_alone(family: str) -> None:
    moe, ids = tiny_moe(family), tokens()
    changed = ids.clone()
    changed[:, 5:] = 3
    torch.testing.assert_close(logits(moe, ids)[:, :5], logits(moe, changed)[:, :5], atol=1e-6, rtol=1e-6)
    assert (logits(moe, ids)[:, 5:] - logits(moe, changed)[:, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family: str, side: str) -> None:
    moe, ids = tiny_moe(family), tokens()
    pad, ones = torch.full((2, 4), PAD), torch.ones(2, 9, dtype=torch.long)
    order = (lambda p, x: [p, x]) if side == "left" else (lambda p, x: [x, p])
    padded, mask = torch.cat(order(pad, ids), 1), torch.cat(order(torch.zeros_like(pad), ones), 1)
    given = logits(moe, padded, attention_mask=mask)
    kept = given[:, 4:] if side == "left" else given[:, :9]
    torch.testing.assert_close(kept, logits(moe, ids), atol=1e-5, rtol=0)


def test_a_row_is_the_same_alone_and_in_a_batch(family: str) -> None:
    moe, ids = tiny_moe(family), tokens(4)
    together = logits(moe, ids)
    for row in range(4):
        torch.testing.assert_close(together[row : row + 1], logits(moe, ids[row : row + 1]), atol=1e-5, rtol=0)


def test_packed_sequences_are_as_separate_ones(family: str) -> None:
    moe, ids = tiny_moe(family), tokens()
    positions = torch.arange(9).repeat(2).unsqueeze(0)
    packed = logits(moe, ids.reshape(1, -1), position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed.reshape(2, 9, -1), logits(moe, ids), atol=1e-5, rtol=0)


def test_embeddings_route_as_their_tokens_do(family: str) -> None:
    moe, ids = tiny_moe(family), tokens()
    embeddings = moe.get_input_embeddings()(ids)
    assert torch.equal(moe(inputs_embeds=embeddings).logits, moe(ids).logits)


def test_generation_from_embeddings_equals_that_from_tokens(family: str) -> None:
    moe, ids = tiny_moe(family), tokens()
    written = moe.generate(ids, max_new_tokens=6, do_sample=False)[:, 9:]
    embeddings = moe.get_input_embeddings()(ids)
    assert torch.equal(moe.generate(inputs_embeds=embeddings, max_new_tokens=6, do_sample=False), written)


def test_the_last_logits_alone_are_the_last_of_all(family: str) -> None:
    """generate() asks the signature whether it may save itself the prompt's logits."""
    moe, ids = tiny_moe(family), tokens()
    assert moe._supports_logits_to_keep()
    torch.testing.assert_close(logits(moe, ids, logits_to_keep=2), logits(moe, ids)[:, -2:], atol=1e-6, rtol=0)


def test_forward_names_the_native_keyword_arguments(family: str) -> None:
    """Callers ask the signature whether a model can return its attentions."""
    moe, dense = tiny_moe(family), tiny_dense(family)
    for ours, native in ((moe, dense), (moe.base_model, dense.base_model)):
        given, wanted = (inspect.signature(model.forward).parameters["kwargs"] for model in (ours, native))
        assert given.annotation == wanted.annotation


def test_chunks_with_a_cache_equal_one_pass(family: str) -> None:
    moe, ids = tiny_moe(family), tokens(2, 12)
    cache, parts = None, []
    with torch.no_grad():
        for first, last in ((0, 5), (5, 6), (6, 12)):
            output = moe(ids[:, first:last], past_key_values=cache, use_cache=True)
            cache, parts = output.past_key_values, [*parts, output.logits]
    torch.testing.assert_close(torch.cat(parts, 1), logits(moe, ids), atol=1e-5, rtol=0)


def test_the_cache_carries_router_state_and_without_it_logits_differ() -> None:
    """The negative control: the equality above would fail if the state were lost."""
    moe, ids = tiny_moe("Llama"), tokens(2, 12)
    with torch.no_grad():
        cache = moe(ids[:, :8], use_cache=True).past_key_values
        for layer in cache.layers:
            layer.router_sums = None
        forgetful = moe(ids[:, 8:], past_key_values=cache).logits
    assert (forgetful - logits(moe, ids)[:, 8:]).abs().max() > 1e-3


def test_a_cropped_cache_forgets_what_was_cropped() -> None:
    moe, ids = tiny_moe("Llama"), tokens(2, 12)
    with torch.no_grad():
        cache = moe(torch.cat([ids[:, :8], tokens(2, 4, seed=9)], 1), use_cache=True).past_key_values
        cache.crop(-4)
        torch.testing.assert_close(
            moe(ids[:, 8:], past_key_values=cache).logits, logits(moe, ids)[:, 8:], atol=1e-5, rtol=0
        )


def test_a_cache_cropped_to_nothing_starts_anew() -> None:
    moe, ids = tiny_moe("Llama"), tokens(2, 8)
    with torch.no_grad():
        cache = moe(tokens(2, 5, seed=9), use_cache=True).past_key_values
        cache.crop(-5)
        torch.testing.assert_close(moe(ids, past_key_values=cache).logits, logits(moe, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generation_with_the_cache_equals_without(family: str, settings: dict[str, object]) -> None:
    """A left-padded batch, so that padding and beams have every chance to disturb the context."""
    moe = tiny_moe(family)
    ids = torch.cat([torch.full((2, 3), PAD), tokens()], 1)
    ids[1, 3:5] = torch.tensor([PAD, BOS])
    mask = (ids != PAD).long()
    common = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    without = {k: v for k, v in settings.items() if k != "cache_implementation"}
    cached = moe.generate(ids, **common, **settings)
    assert torch.equal(cached, moe.generate(ids, **common, **without, use_cache=False))


def test_a_static_cache_needs_no_padding(family: str) -> None:
    moe, ids = tiny_moe(family), tokens()
    common = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(
        moe.generate(ids, **common, cache_implementation="static"), moe.generate(ids, **common, use_cache=False)
    )


def test_prompt_lookup_decoding_equals_greedy(family: str) -> None:
    moe, ids = tiny_moe(family), tokens(1)
    plain = moe.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(plain, moe.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3))


def test_bos_goes_to_the_seeds_ffn_and_counts_in_no_mean() -> None:
    moe = tiny_moe("Llama")
    with recorded_routers(moe) as calls, torch.no_grad():
        moe(tokens())
        assert not calls[0].routing.token_mask[:, 0].any()
        assert calls[0].routing.token_mask[:, 1:].all()
        first = routers_of(moe)[0]
        scores = calls[0].hidden @ first.weight.T + first.bias
        weight = first.context_logit.sigmoid()
        mean = scores[:, 1:].cumsum(1) / torch.arange(1, 9)[None, :, None]
        expected = (1 - weight) * scores[:, 1:] + weight * mean
        torch.testing.assert_close(calls[0].logits[:, 1:], expected, atol=1e-5, rtol=0)
    only_bos = torch.full((1, 1), BOS)
    dense = tiny_dense("Llama")
    dense.load_state_dict(without_experts(moe))
    assert torch.equal(logits(moe, only_bos), logits(dense, only_bos))


def test_top_1_weights_are_one_and_still_carry_a_gradient() -> None:
    scores = torch.randn(2, 5, 3, requires_grad=True)
    weights, _ = expert_weights(scores, _routing(torch.ones(2, 5).bool()), 1, True)
    assert torch.equal(weights, torch.ones_like(weights))
    weights.sum().backward()
    assert scores.grad.abs().max() > 1e-3


def test_published_eq_6_does_not_renormalise() -> None:
    scores = torch.randn(2, 5, 3)
    weights, _ = expert_weights(scores, _routing(torch.ones(2, 5).bool()), 2, False)
    torch.testing.assert_close(weights, scores.softmax(-1).topk(2).values)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_task_loss_reaches_router_rows_and_context_weight(family: str, top_k: int) -> None:
    moe, ids = tiny_moe(family, num_experts_per_tok=top_k).train(), tokens()
    moe(ids, labels=ids).loss.backward()
    for router in routers_of(moe):
        for name, parameter in router.named_parameters():
            assert parameter.grad.abs().max() > 1e-7, name


def test_gradient_checkpointing_gives_equal_gradients(family: str) -> None:
    plain, ids = tiny_moe(family).train(), tokens()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-7, rtol=1e-5, msg=name)


@pytest.mark.parametrize("additive", [True, False])
@torch.no_grad()
def test_a_4d_mask_says_what_the_context_is(additive: bool) -> None:
    """Two texts that share their first five tokens, in one row: each token's mean is over its own branch."""
    moe, ids, other = tiny_moe("Llama"), tokens(1), tokens(1, 9, seed=5)
    other[:, :5] = ids[:, :5]
    seen = torch.ones(13, 13).tril().bool()
    seen[9:, 5:9] = False
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min) if additive else seen
    positions = torch.cat([torch.arange(9), torch.arange(5, 9)])[None]
    both = moe(torch.cat([ids, other[:, 5:]], 1), attention_mask=mask[None, None], position_ids=positions).logits
    torch.testing.assert_close(both[:, :9], moe(ids).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(both[:, 9:], moe(other).logits[:, 5:], atol=1e-5, rtol=0)


def test_a_4d_mask_over_a_cache_needs_token_mask() -> None:
    moe, ids = tiny_moe("Llama"), tokens()
    with pytest.raises(ValueError, match="pass token_mask"):
        moe(ids, attention_mask=torch.zeros(2, 1, 9, 12))


@pytest.mark.parametrize("context", ["prefix", "none"])
def test_routers_compute_in_float32_under_autocast(context: str) -> None:
    moe, hidden = tiny_moe("Llama", router_context=context), torch.randn(2, 5, 32)
    router, routing = routers_of(moe)[0], _routing(torch.ones(2, 5).bool())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        inside = router(hidden, routing)
        assert moe(tokens()).logits.isfinite().all()
    assert torch.equal(inside, router(hidden, routing))


def test_routers_stay_in_float32(tmp_path: object) -> None:
    moe = tiny_moe("Llama")
    moe.save_pretrained(tmp_path)
    half = type(moe).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for router in routers_of(half) for p in router.parameters()} == {torch.float32}
    assert half.model.layers[0].mlp.experts["up_proj"].lora_A.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_context": "suffix"}, "allowed are prefix, prompt, mean, none"),
        ({"num_experts_per_tok": 4}, "between 1 and the 3 experts"),
    ],
)
def test_a_wrong_config_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_moe("Llama", **settings)


def _routing(token_mask: torch.Tensor) -> object:
    return Routing(token_mask, None, None, LayerEvidence())
