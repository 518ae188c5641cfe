"""How relevant public texts are to an expert of which there is nothing but the expert: how much better it reads them.

Shapes: N rows of the pool, B texts in a batch, T tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.adapters import ADAPTER_CONFIG
from mergekit_moe.data import leading_tokens
from mergekit_moe.selection.processes import ALONE, Processes
from mergekit_moe.selection.relevance import Relevance
from mergekit_moe.selection.store import GAINS, fill

_BATCH = 16
_SMALLEST = 1e-6
_HALF_AT, _STEEPNESS = 1.5, 4.0


def write_expert_gains(
    base: Path,
    expert: Path,
    texts: Sequence[str],
    out: Path,
    *,
    max_length: int,
    processes: Processes = ALONE,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Write gains.npy (N, 1): NLL_base - NLL_expert of each text, nats a token; resumable as `store.fill` is.

    Args:
        base: folder of the base model and its tokenizer.
        expert: folder of the expert, a PEFT adapter of that base or a fine-tune.
        max_length: tokens of a text that are read.
    """
    fill(gain_of(base, expert, max_length=max_length), texts, out, GAINS, processes=processes, wait=wait)


def load_gains(folder: Path) -> NDArray[np.floating]:
    """Return the (N,) gains that `write_expert_gains` wrote."""
    return np.load(folder / GAINS)[:, 0]


def gain_of(base: Path, expert: Path, *, max_length: int) -> Callable[[list[str]], tuple[NDArray[np.float64], int]]:
    """Return a function of n texts: their (n, 1) gains, and how many were longer than `max_length`."""
    from peft import PeftModel

    from mergekit_moe.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(base)
    model: Any = load_model(base).eval()
    if (expert / ADAPTER_CONFIG).is_file():
        model = PeftModel.from_pretrained(model, str(expert)).eval()
        alone: Any = None
    else:
        alone = load_model(expert).eval()
    # One token at least stands before the first that is judged.
    first = leading_tokens(tokenizer) or [tokenizer.eos_token_id or 0]

    def gains(texts: list[str]) -> tuple[NDArray[np.float64], int]:
        tokens = [first + ids for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
        order = np.argsort([len(ids) for ids in tokens], kind="stable")
        found = np.zeros((len(texts), 1))
        for at in range(0, len(order), _BATCH):
            places = order[at : at + _BATCH]
            batch = [tokens[place][:max_length] for place in places]
            # One copy of the base's weights serves an adapter and what it is compared with.
            with model.disable_adapter() if alone is None else nullcontext():
                without = _losses(model, batch)
            found[places, 0] = without - _losses(model if alone is None else alone, batch)
        return found, sum(len(ids) > max_length for ids in tokens)

    return gains


def _losses(model: Any, batch: list[list[int]]) -> NDArray[np.float64]:
    """Return (B,) each text's mean loss, nats a token; 0 where there is no token to judge."""
    import torch
    from torch.nn import functional as F

    from mergekit_moe.data import collate

    rows = collate([{"input_ids": ids, "labels": ids} for ids in batch])
    inputs = {name: tensor.to(model.device) for name, tensor in rows.items()}
    labels = inputs.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    counts = (labels >= 0).sum(1).clamp(min=1)
    return (losses.sum(1) / counts).double().cpu().numpy()


def gain_relevance(gain_N: NDArray[np.floating]) -> Relevance:
    """Score the pool by its gains (N,): a logistic curve, at a half 1.5 standard deviations above the pool's mean.

    There are no texts of the client's to judge by: `separation` is the share of the pool that the expert reads better
    than its base does.
    """
    gain_N = np.asarray(gain_N, dtype=np.float64)
    spread = float(gain_N.std()) or 1.0
    scores_N = 1.0 / (1.0 + np.exp(-_STEEPNESS * ((gain_N - gain_N.mean()) / spread - _HALF_AT)))
    return Relevance(np.clip(scores_N, _SMALLEST, 1.0), float((gain_N > 0).mean()))
