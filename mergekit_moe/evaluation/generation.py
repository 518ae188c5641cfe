"""Answers that a model writes, without sampling, against the right ones."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from mergekit_moe.data import leading_tokens
from mergekit_moe.errors import DataError
from mergekit_moe.recipe import Evaluation
from mergekit_moe.task_recipe import Generation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


def judge_generation(
    model: "PreTrainedModel", tokenizer: Any, rows: "Dataset", task: Generation, settings: Evaluation
) -> dict[str, float]:
    """Return `accuracy`: the share of rows where what the model writes is the right answer, to the letter.

    Args:
        rows: with `prompt` and `answer`.

    Raises:
        DataError: if a right answer holds nothing that `task.extract` matches.
    """
    right = [_extracted(answer, task.extract) for answer in rows["answer"]]
    if None in right:
        raise DataError(
            f"evaluation: the right answer {rows['answer'][right.index(None)]!r} holds nothing that 'extract' "
            f"({task.extract}) matches; change either"
        )
    written = write_answers(model, tokenizer, list(rows["prompt"]), task.max_new_tokens, settings)
    hits = sum(_extracted(text, task.extract) == answer for text, answer in zip(written, right, strict=True))
    return {"accuracy": hits / len(rows)}


@torch.no_grad()
def write_answers(
    model: "PreTrainedModel", tokenizer: Any, prompts: list[str], max_new_tokens: int, settings: Evaluation
) -> list[str]:
    """Return what the model writes after each prompt, always by its likeliest token, up to EOS.

    Longer prompts than `settings.max_length` tokens lose their beginning, but for BOS.
    """
    model.eval()
    bos = leading_tokens(tokenizer)
    encoded = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    room = settings.max_length - len(bos)
    contexts = [bos + ids[max(len(ids) - room, 0) :] for ids in encoded]
    written = [""] * len(prompts)
    with greedy(model, tokenizer, max_new_tokens) as stops:
        # Long ones first: rows of a batch are of like length, and what doesn't fit into memory fails at once.
        order = sorted(range(len(contexts)), key=lambda row: -len(contexts[row]))
        for first in range(0, len(order), settings.batch_size):
            places = order[first : first + settings.batch_size]
            batch = left_padded([contexts[row] for row in places], model.device)
            new = model.generate(**batch)[:, batch["input_ids"].shape[1] :]
            for row, ids in zip(places, new.tolist(), strict=True):
                end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
                written[row] = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return written


@contextmanager
def greedy(model: "PreTrainedModel", tokenizer: Any, max_new_tokens: int) -> Iterator[set[int]]:
    """Inside the block, `model.generate` takes the likeliest token each time, whatever the model's own settings say.

    Yields the tokens that it stops at: the model's and the tokenizer's EOS.
    """
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    stops = sorted({token for token in [*ends, tokenizer.eos_token_id] if token is not None})
    # Of a finished row's padding nothing is read: any id does, where the model has none for it.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        bos_token_id=own.bos_token_id,
        pad_token_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    try:
        yield set(stops)
    finally:
        model.generation_config = own


def left_padded(contexts: list[list[int]], device: Any) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, (B, T), so that all rows end together."""
    length = max(map(len, contexts))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in contexts], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in contexts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _extracted(text: str, pattern: str | None) -> str | None:
    """Return the part of a text that is compared, None where there is no such part."""
    if pattern is None:
        return text.strip()
    found = re.search(pattern, text)
    if found is None:
        return None
    part = found[1] if found.re.groups else found[0]
    return None if part is None else part.strip()
