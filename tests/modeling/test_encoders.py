"""Encoders: the same exact experts, and a router that sees its own row whole and no other."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ENCODERS, FFN, PAD, PROJECTIONS, tiny_dense, tiny_moe, tokens
from test_modeling import blocks_of, without_experts
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mergekit_moe.modeling import HEADS, model_class
from mergekit_moe.models import recorded_routers, routers_of

VISION = ("CLIP", "CLIPVision", "ViT")
TEXT = tuple(name for name in ENCODERS if name not in VISION)


def inputs(encoder: str, batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    given = {}
    if encoder in VISION:
        given["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    if encoder not in VISION or encoder == "CLIP":
        given["input_ids"] = tokens(batch, seed=seed)
    return given


def double(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}


def states(model: PreTrainedModel, **kwargs: torch.Tensor) -> torch.Tensor:
    """Return the last hidden state in float64, where states as large as these leave no room for rounding."""
    with torch.no_grad():
        return last_state(copy.deepcopy(model).double()(**double(kwargs)))


def last_state(outputs: ModelOutput) -> torch.Tensor:
    """Return the last hidden state, of two towers the image tower's."""
    return outputs.get("vision_model_output", outputs).last_hidden_state


def fold(moe: PreTrainedModel, encoder: str, expert: int) -> PreTrainedModel:
    """Return the native encoder whose FFNs carry one expert's difference, folded in float64."""
    state = without_experts(moe)
    for block, module in blocks_of(moe):
        for projection in FFN.get(encoder, PROJECTIONS):
            down, up = module.experts[projection.replace(".", "_")].factors(expert)
            key = f"{block}.{projection}.weight"
            delta = moe.config.experts[expert]["scale"] * up.double().T @ down.double()
            state[key] = state[key].double() + delta
    dense = tiny_dense(encoder).double()
    dense.load_state_dict(state)
    return dense


def test_a_pinned_expert_is_exactly_the_dense_expert(encoder: str) -> None:
    moe, given = tiny_moe(encoder, router_excluded_token_ids=[]), inputs(encoder)
    for expert in range(3):
        pinned = states(moe, **given, forced_expert=torch.tensor([expert, expert]))
        torch.testing.assert_close(pinned, states(fold(moe, encoder, expert), **given), atol=1e-5, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_identical_experts_reproduce_the_dense_expert(encoder: str, top_k: int) -> None:
    moe = tiny_moe(encoder, (4, 4, 4), num_experts_per_tok=top_k, router_excluded_token_ids=[])
    for _, block in blocks_of(moe):
        for low_rank in block.experts.values():
            for matrix in (low_rank.lora_A, low_rank.lora_B):
                matrix.data = matrix.data[:4].repeat(3, 1)
    expected = states(fold(moe, encoder, 0), **inputs(encoder))
    torch.testing.assert_close(states(moe, **inputs(encoder)), expected, atol=1e-5, rtol=1e-6)


def test_experts_without_difference_reproduce_the_seed(encoder: str) -> None:
    moe, dense = tiny_moe(encoder, (0, 0)), tiny_dense(encoder)
    dense.load_state_dict(without_experts(moe))
    # Not bit by bit: some processors multiply a batch of one shape otherwise than one of another.
    torch.testing.assert_close(states(moe, **inputs(encoder)), states(dense, **inputs(encoder)), atol=1e-12, rtol=0)


def test_a_row_is_the_same_alone_and_in_any_batch(encoder: str) -> None:
    moe, given = tiny_moe(encoder), inputs(encoder, 4)
    together = states(moe, **given)
    for row in range(4):
        alone = states(moe, **{name: value[row : row + 1] for name, value in given.items()})
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoder", VISION)
def test_an_image_s_context_is_its_own_patches_and_not_the_batch_s(encoder: str) -> None:
    """The code published with the paper takes the mean over the whole batch: there, neighbours change an image."""
    moe, pictures = tiny_moe(encoder), inputs(encoder, 4)
    own = {**pictures, "pixel_values": pictures["pixel_values"][:1]}
    alone, together = (recorded_logits(moe, given)[:, :1] for given in (own, pictures))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    with recorded_routers(moe) as calls, torch.no_grad():
        moe(**pictures)
        call, router = calls[0], routers_of(moe)[0]
        scores = call.hidden @ router.weight.T + router.bias
        published = torch.lerp(scores, scores.mean((0, 1), keepdim=True), router.context_logit.sigmoid())
    assert (published[:1] - alone[0]).abs().max() > 1e-2


def recorded_logits(moe: PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the routers' logits, (layers, B, T, K)."""
    with recorded_routers(moe) as calls, torch.no_grad():
        moe(**given)
        return torch.stack([call.logits for call in calls])


@pytest.mark.parametrize("encoder", TEXT)
def test_padding_changes_nothing(encoder: str) -> None:
    moe, ids = tiny_moe(encoder), tokens()
    padded = torch.cat([ids, torch.full((2, 4), PAD)], 1)
    given = states(moe, input_ids=padded, attention_mask=(padded != PAD).long())
    torch.testing.assert_close(given[:, :9], states(moe, input_ids=ids), atol=1e-5, rtol=0)


def test_the_router_mixes_in_the_mean_over_its_own_row(encoder: str) -> None:
    moe = tiny_moe(encoder)
    with recorded_routers(moe) as calls, torch.no_grad():
        moe(**inputs(encoder))
        call, router = calls[1], routers_of(moe)[1]
    scores = call.hidden.double() @ router.weight.T.double() + router.bias.double()
    mask = call.routing.token_mask.expand(scores.shape[:2]).unsqueeze(-1)
    weight = router.context_logit.double().sigmoid()
    mean = (scores * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    expected = (1 - weight) * scores + weight * mean
    torch.testing.assert_close(call.logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_task_loss_reaches_routers_with_and_without_checkpointing(encoder: str) -> None:
    plain = tiny_moe(encoder, router_excluded_token_ids=[]).double().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        torch.manual_seed(0)  # dropout
        last_state(model(**double(inputs(encoder)))).square().mul(torch.arange(32)).sum().backward()
    for router in routers_of(plain):
        for name, parameter in router.named_parameters():
            assert parameter.grad.abs().max() > 1e-7, name
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("head", [name for name in HEADS if name not in ("Model", "ForCausalLM")])
def test_every_native_head_stands_on_our_encoder(encoder: str, head: str, tmp_path: Path) -> None:
    if not hasattr(transformers, f"{encoder}{head}"):
        with pytest.raises(ValueError, match=f"no {encoder}{head}"):
            model_class(encoder, head)
        return
    body = tiny_moe(encoder)
    torch.manual_seed(0)
    model = model_class(encoder, head)(body.config).eval()
    report = model.base_model.load_state_dict(body.state_dict(), strict=False)
    assert not any(".experts." in name or ".router." in name for name in (*report[0], *report[1]))
    model.save_pretrained(tmp_path)
    assert model.config.auto_map[HEADS[head]] == f"modeling_metamoe.{type(model).__name__}"
    assert (tmp_path / "modeling_metamoe.py").is_file()
    loaded, report = getattr(transformers, HEADS[head]).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(loaded) is type(model)
    with torch.no_grad():
        read = inputs(encoder)
        if head == "ForImageClassification":
            read.pop("input_ids", None)
        assert torch.equal(loaded.eval()(**read).logits, model(**read).logits)
        pinned = [model(**read, forced_expert=torch.tensor([e, e])).logits for e in (0, 1)]
    assert (pinned[0] - pinned[1]).abs().max() > 1e-5
