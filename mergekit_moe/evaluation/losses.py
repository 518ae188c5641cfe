"""Losses of held-out rows."""

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from mergekit_moe.data import IGNORED, batches
from mergekit_moe.models import scored_inputs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


@torch.no_grad()
def row_losses(model: "PreTrainedModel", rows: "Dataset", batch_size: int) -> tuple[list[float], list[int]]:
    """Return each row's summed loss in nats, and its number of learnt tokens."""
    model.eval()
    sums: list[float] = []
    counts: list[int] = []
    for batch in batches(rows, batch_size, model.device):
        logits = model(**scored_inputs(model, batch), use_cache=False).logits
        labels = batch["labels"][:, 1:]
        each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        sums += each.cpu().double().sum(1).tolist()
        counts += (labels != IGNORED).sum(1).tolist()
    return sums, counts
