"""Tiny models, a tokenizer and questions for the tests of tasks."""

import random
from typing import Any

from conftest import tiny_dense, tiny_moe
from transformers import PreTrainedModel

from mergekit_moe.seed import train_tokenizer

TOKENIZER = train_tokenizer(["the quick brown fox jumps over the lazy dog 0123456789"] * 3, 300)
WORDS = [*"0123456789", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
MODELS = ["dense", "none", "prefix", "prompt"]
"""A plain model, and one MoE for each context of the router."""


def tiny(kind: str, seed: int = 0) -> PreTrainedModel:
    settings: dict[str, Any] = {"vocab_size": len(TOKENIZER), "eos_token_id": 2}
    return tiny_dense(seed=seed, **settings) if kind == "dense" else tiny_moe("Llama", router_context=kind, **settings)


def sentences(count: int, seed: int, longest: int = 9) -> list[str]:
    """Return texts of various lengths."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]
