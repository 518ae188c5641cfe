"""Dense experts, alone and beside factored ones: exact, in every implementation, and as they lie on disk."""

from pathlib import Path

import pytest
import torch
from conftest import DECODERS, FFN, PROJECTIONS, tiny_dense, tiny_moe, tokens
from safetensors.torch import load_file
from test_encoders import inputs, last_state
from test_modeling import blocks_of, logits
from transformers import PreTrainedModel

from mergekit_moe.modeling.experts_metamoe import BlockCall
from mergekit_moe.modeling.routing_metamoe import LayerEvidence, Routing, expert_weights

MIXED = (2, None, 0, None)


def forward(model: PreTrainedModel, family: str, **kwargs: object) -> torch.Tensor:
    """Return logits, or an encoder's last hidden state, of a batch of two."""
    if family in DECODERS:
        return logits(model, tokens(), **kwargs)
    with torch.no_grad():
        return last_state(model(**inputs(family), **kwargs))


def check_pinned(family: str, folder: Path, ranks: tuple[int | None, ...], dense: list[int]) -> dict[str, torch.Tensor]:
    moe = tiny_moe(family, ranks, router_excluded_token_ids=[])
    moe.save_pretrained(folder)
    disk = load_file(folder / "model.safetensors")
    for expert in dense:
        native = tiny_dense(family)
        state = {k: v for k, v in disk.items() if ".router." not in k and ".experts." not in k}
        for block, _ in blocks_of(moe):
            for name in FFN.get(family, PROJECTIONS):
                for kind in ("weight", "bias"):
                    key = f"{block}.experts.{expert}.{name.replace('.', '_')}.{kind}"
                    if key in disk:
                        assert disk[key].ndim == (2 if kind == "weight" else 1)
                        state[f"{block}.{name}.{kind}"] = disk[key]
        if "embed_out.weight" in state:  # the library's own name on disk for what it calls lm_head in memory
            state["lm_head.weight"] = state.pop("embed_out.weight")
        if getattr(native.config, "tie_word_embeddings", False):
            state = {**{k: v for k, v in native.state_dict().items() if "lm_head" in k or "embed_out" in k}, **state}
            native.load_state_dict(state)
            native.tie_weights()
        else:
            native.load_state_dict(state)
        pinned = forward(moe, family, forced_expert=torch.tensor([expert, expert]))
        torch.testing.assert_close(pinned, forward(native, family), atol=2e-5, rtol=1e-5)
    return disk


def test_a_pinned_dense_expert_is_exactly_its_own_ffn(family: str, tmp_path: Path) -> None:
    check_pinned(family, tmp_path, MIXED, [1, 3])


def test_a_pinned_dense_expert_of_an_encoder_is_exactly_its_own_ffn(encoder: str, tmp_path: Path) -> None:
    check_pinned(encoder, tmp_path, MIXED, [1, 3])


@pytest.mark.parametrize("family", ["Llama", "Starcoder2", "Phi3", "Bert"])
def test_a_model_of_dense_experts_alone_stores_no_ffn_but_theirs(family: str, tmp_path: Path) -> None:
    disk = check_pinned(family, tmp_path, (None, None), [0, 1])
    ends = tuple(f"{name}.weight" for name in FFN.get(family, PROJECTIONS))
    left = [name for name in disk if name.endswith(ends) and ".experts." not in name]
    assert not [name for name in left if ".attention." not in name]  # where BERT has an output.dense too


@pytest.mark.parametrize("ranks", [MIXED, (None, None, None)], ids=str)
def test_saved_and_loaded_it_is_the_same(family: str, ranks: tuple[int | None, ...], tmp_path: Path) -> None:
    moe = tiny_moe(family, ranks, num_experts_per_tok=2)
    moe.save_pretrained(tmp_path / "once")
    again, report = type(moe).from_pretrained(tmp_path / "once", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(logits(again.eval(), tokens()), logits(moe, tokens()))
    again.save_pretrained(tmp_path / "twice")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("family", ["Llama", "Starcoder2"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_implementation_gives_the_same_values_and_gradients(family: str, top_k: int) -> None:
    given = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        moe = tiny_moe(family, (2, None, None), num_experts_per_tok=top_k)
        moe.set_experts_implementation(implementation)
        assert moe.base_model.layers[0].mlp.experts["dense"].config._experts_implementation == implementation
        moe(tokens(), labels=tokens()).loss.backward()
        given.append((logits(moe, tokens()), {n: p.grad for n, p in moe.named_parameters() if p.grad is not None}))
    for values, gradients in given[1:]:
        torch.testing.assert_close(values, given[0][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(gradients, given[0][1], atol=1e-5, rtol=1e-4)


def test_grouped_is_the_default_as_for_native_models() -> None:
    assert tiny_moe("Llama", (None, None)).config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("family", ["Llama", "Starcoder2"])
def test_a_mixture_of_both_kinds_is_the_weighted_sum(family: str, top_k: int, renormalise: bool, grad: bool) -> None:
    """Against the definition: each expert's own output, one at a time, weighted."""
    moe = tiny_moe(family, MIXED, num_experts_per_tok=top_k, norm_topk_prob=renormalise)
    block, hidden = moe.model.layers[1].mlp, torch.randn(2, 7, 32)
    routing = Routing(torch.tensor([[True, True, False, True, True, True, True]] * 2), None, None, LayerEvidence())

    def run(routing: Routing) -> torch.Tensor:
        block.call = BlockCall(routing, None, norm_follows=False)
        return block(hidden)

    with torch.set_grad_enabled(grad):
        weights, indices = expert_weights(block.router(hidden, routing), routing, top_k, renormalise)
        weights = torch.ones_like(indices, dtype=torch.float32) if weights is None else weights
        given = run(routing)
    block.top_k, block.renormalise = 1, True
    everywhere = Routing(torch.ones(2, 7).bool(), None, None, LayerEvidence())
    expected = torch.zeros_like(given)
    with torch.no_grad():
        for expert in range(4):
            alone = run(everywhere._replace(forced_expert=torch.tensor([expert, expert])))
            expected += alone * (weights * (indices == expert)).sum(-1, keepdim=True)
        seeds = run(everywhere._replace(forced_expert=torch.tensor([2, 2])))
    expected = torch.where(routing.token_mask.unsqueeze(-1), expected, seeds)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


def test_an_unknown_kind_is_refused() -> None:
    from mergekit_moe.modeling import config_class

    with pytest.raises(ValueError, match="allowed are lora, dense"):
        config_class("Llama")(experts=[{"name": "a", "kind": "sparse"}])
