"""The router's context over the prompt alone: what counts as prompt, and that it stays frozen."""

import pytest
import torch
from conftest import BOS, PAD, tiny_moe, tokens
from datasets import Dataset

from mergekit_moe.data import IGNORED, collate
from mergekit_moe.modeling.routing_metamoe import prompt_tokens
from mergekit_moe.models import recorded_routers, routers_of, scored_inputs


def prompts(*lengths: int, total: int = 9) -> torch.Tensor:
    return (torch.arange(total) < torch.tensor(lengths)[:, None]).long()


def expected_logits(moe: torch.nn.Module, hidden: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The definition, token by token in float64: the mean over the counted tokens up to this one."""
    router = routers_of(moe)[0].double()
    scores = hidden.double() @ router.weight.T + router.bias
    weight = router.context_logit.sigmoid()
    expected = torch.empty_like(scores)
    for row in range(scores.shape[0]):
        for place in range(scores.shape[1]):
            seen = scores[row, : place + 1][counted[row, : place + 1].bool()]
            mean = seen.mean(0) if len(seen) else torch.zeros_like(scores[row, place])
            expected[row, place] = (1 - weight) * scores[row, place] + weight * mean
    return expected.float()


@torch.no_grad()
def test_the_mean_is_over_the_prompt_and_stays_frozen() -> None:
    moe, ids, prompt = tiny_moe("Llama", router_context="prompt"), tokens(), prompts(4, 6)
    with recorded_routers(moe) as calls:
        moe(ids, prompt_mask=prompt)
    counted = prompt.clone()
    counted[:, 0] = 0  # BOS is no domain's
    expected = expected_logits(moe, calls[0].hidden, counted)
    torch.testing.assert_close(calls[0].logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_labels_tell_the_prompt() -> None:
    """What stands before the first label is prompt; a later turn that isn't learnt is none."""
    moe, ids, prompt = tiny_moe("Llama", router_context="prompt"), tokens(), prompts(4, 6)
    labels = ids.masked_fill(prompt.bool(), IGNORED)
    labels[0, 7] = IGNORED
    given = moe(ids, labels=labels).logits
    assert torch.equal(given, moe(ids, prompt_mask=prompt).logits)
    assert (given - moe(ids).logits).abs().max() > 1e-3


@torch.no_grad()
def test_a_text_without_a_prompt_counts_whole() -> None:
    moe, ids = tiny_moe("Llama", router_context="prompt"), tokens()
    labels = ids.clone()
    labels[:, 0] = IGNORED  # BOS alone is no prompt
    prefix = tiny_moe("Llama", router_context="prefix")
    torch.testing.assert_close(moe(ids, labels=labels).logits, prefix(ids).logits)
    torch.testing.assert_close(moe(ids).logits, prefix(ids).logits)


@torch.no_grad()
def test_packed_sequences_have_their_own_prompts() -> None:
    moe, ids, prompt = tiny_moe("Llama", router_context="prompt"), tokens(3), prompts(4, 6, 1)
    labels = ids.masked_fill(prompt.bool(), IGNORED)
    positions = torch.arange(9).repeat(3).unsqueeze(0)
    packed = moe(ids.reshape(1, -1), labels=labels.reshape(1, -1), position_ids=positions, use_cache=False)
    separate = moe(ids, labels=labels)
    torch.testing.assert_close(packed.logits.reshape(3, 9, -1), separate.logits, atol=1e-5, rtol=0)


def test_prompt_tokens_against_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        learnt, routed = (torch.rand(1, 12, generator=generator) < 0.4 for _ in range(2))
        starts = torch.tensor([[0] * 5 + [5] * 4 + [9] * 3])
        given = prompt_tokens(torch.where(learnt, 7, IGNORED), routed, starts)
        for first, last in ((0, 5), (5, 9), (9, 12)):
            before = [not learnt[0, first : place + 1].any() for place in range(first, last)]
            has_prompt = any(b and routed[0, first + i] for i, b in enumerate(before))
            assert given[0, first:last].tolist() == (before if has_prompt else [True] * (last - first))


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}],
    ids=str,
)
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPTNeoX"])
def test_generation_with_the_cache_equals_without(family: str, settings: dict[str, object]) -> None:
    """And both equal one pass over what was written, told where the prompt ended; one row has none."""
    moe = tiny_moe(family, router_context="prompt")
    ids = torch.cat([torch.full((3, 3), PAD), tokens(3)], 1)
    ids[1, 3:5] = torch.tensor([PAD, BOS])
    ids[2, 3:] = torch.tensor([PAD] * 8 + [BOS])
    mask = (ids != PAD).long()
    common = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    cached = moe.generate(ids, **common, **settings)
    without = {k: v for k, v in settings.items() if k == "num_beams"}
    assert torch.equal(cached, moe.generate(ids, **common, **without, use_cache=False))
    if "num_beams" in settings:
        return
    whole = torch.cat([mask, torch.ones(3, 12, dtype=torch.long)], 1)
    prompt = torch.cat([mask, torch.zeros(3, 12, dtype=torch.long)], 1)
    prompt[2] = 1
    with torch.no_grad():
        logits = moe(cached, attention_mask=whole, prompt_mask=prompt).logits
    assert torch.equal(logits[:, 11:-1].argmax(-1), cached[:, 12:])


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"embeddings": True}],
    ids=str,
)
def test_generation_keeps_the_prompt_s_context_without_padding_too(settings: dict[str, object]) -> None:
    """generate() drops an attention mask that is all ones."""
    moe, ids = tiny_moe("Llama", router_context="prompt"), tokens(3)
    given = {"input_ids": ids, "prompt_mask": ids != BOS} | settings
    if given.pop("embeddings", False):
        given["inputs_embeds"] = moe.get_input_embeddings()(given.pop("input_ids"))
    new = moe.generate(**given, max_new_tokens=12, do_sample=False)[:, -12:]
    with torch.no_grad():
        logits = moe(torch.cat([ids, new], 1), prompt_mask=prompts(9, 9, 9, total=21)).logits
    assert torch.equal(logits[:, 8:-1].argmax(-1), new)


def test_prompt_lookup_decoding_equals_greedy() -> None:
    moe, ids = tiny_moe("Llama", router_context="prompt"), tokens(1)
    plain = moe.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(plain, moe.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3))


@torch.no_grad()
def test_stages_that_ask_for_no_loss_name_the_prompt() -> None:
    moe = tiny_moe("Llama", router_context="prompt")
    rows = Dataset.from_list(
        [
            {"input_ids": [BOS, 5, 6, 7, 8, 9], "labels": [IGNORED] * 3 + [7, 8, 9]},
            {"input_ids": [BOS, 4, 3, 2], "labels": [IGNORED] * 2 + [3, 2]},
        ]
    )
    batch = collate(list(rows))
    assert torch.equal(moe(**scored_inputs(moe, batch)).logits, moe(**batch).logits)
