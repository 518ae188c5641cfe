"""Expert gain against PEFT run by hand, text by text."""

from pathlib import Path

import numpy as np
import torch
from conftest import tiny_dense, write_adapter
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_moe.seed import train_tokenizer
from mergekit_moe.selection.expert_gain import gain_of, gain_relevance, load_gains, write_expert_gains

TEXTS = ["a short text", "bread, butter and a good deal more than that", "x", "sails and ropes " * 30, "a short text"]


def test_gain_is_the_difference_of_mean_losses(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS * 20, 300)
    tiny_dense(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "adapter", 1)
    gains, longer = gain_of(tmp_path / "base", tmp_path / "adapter", max_length=24)(TEXTS)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").double()
    expert = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base").double(), str(tmp_path / "adapter")
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    lengths = []
    for text, gain in zip(TEXTS, gains[:, 0].tolist(), strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        lengths.append(len(ids))
        tokens = torch.tensor([ids[:24]])
        with torch.no_grad():
            alone = float(base(input_ids=tokens, labels=tokens).loss - expert(input_ids=tokens, labels=tokens).loss)
        assert abs(gain - alone) < 1e-5
    assert longer == sum(length > 24 for length in lengths) > 0
    assert np.ptp(gains) > 1e-4

    (tmp_path / "out").mkdir()
    write_expert_gains(tmp_path / "base", tmp_path / "adapter", TEXTS, tmp_path / "out", max_length=24)
    # Repeated texts are read once, so batches differ: equal but for rounding.
    assert np.allclose(load_gains(tmp_path / "out"), gains[:, 0], atol=1e-5)


def test_relevance_keeps_the_order_of_gains() -> None:
    gains = np.random.default_rng(0).normal(size=100)
    relevance = gain_relevance(gains)
    assert np.array_equal(np.argsort(relevance.scores), np.argsort(gains))
    assert relevance.separation == np.mean(gains > 0)
    assert ((relevance.scores > 0) & (relevance.scores <= 1)).all()
    assert len(set(gain_relevance(np.zeros(5)).scores.tolist())) == 1
