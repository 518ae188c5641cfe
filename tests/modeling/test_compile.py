"""A decode step on a static cache compiles into one graph and gives what it gives uncompiled."""

from collections.abc import Callable

import pytest
import torch
from conftest import PAD, tiny_moe, tokens
from transformers import CompileConfig, StaticCache


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Qwen2"])
def test_compiled_decoding_equals_one_pass(family: str) -> None:
    moe, ids = tiny_moe(family), tokens(2, 12)

    def decode(step: Callable[..., object]) -> torch.Tensor:
        cache, parts = StaticCache(config=moe.config, max_cache_len=16), []
        moe(ids[:, :8], past_key_values=cache, use_cache=True)
        for t in range(8, 12):
            position = torch.full((2, 1), t)
            given = step(input_ids=ids[:, t : t + 1], past_key_values=cache, position_ids=position, use_cache=True)
            parts.append(given.logits)
        return torch.cat(parts, 1)

    torch.compiler.reset()
    with torch.no_grad():
        compiled = decode(torch.compile(moe.forward, fullgraph=True, backend="eager"))
        torch.testing.assert_close(compiled, decode(moe), atol=1e-5, rtol=0)
        torch.testing.assert_close(compiled, moe(ids).logits[:, 8:], atol=1e-5, rtol=0)


def test_generate_compiles_its_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that grow from step to step, or lie otherwise in memory, would have it compiled anew each time."""
    moe, ids = tiny_moe("Llama", router_context="prompt"), tokens(2, 12)
    ids[1, :3] = PAD
    torch.compiler.reset()
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    settings = {"attention_mask": (ids != PAD).long(), "max_new_tokens": 6, "do_sample": False}
    compiling = CompileConfig(fullgraph=True, dynamic=False, backend="eager")
    compiling._compile_all_devices = True
    given = moe.generate(ids, **settings, cache_implementation="static", compile_config=compiling)
    assert hasattr(moe, "_compiled_call")
    assert torch.equal(given, moe.generate(ids, **settings))
