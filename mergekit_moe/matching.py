"""Text encoders as classifiers: a text has the label whose name lies nearest (CLIP's protocol, on text).

Label names are embedded once, by the seed, and stay where they are: experts that are trained apart share one target
space. The text's own tower is the seed, an expert or the unified model. What it is handed need not be token ids:
whatever the encoder's forward takes beside the mask.

Shapes: B rows, T tokens, D embedding size, V labels.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

_BATCH = 64


class Labels(NamedTuple):
    """What a text can be."""

    names: list[str]
    vectors: Tensor
    """(V, D), unit rows, float32: the names, as the seed embeds them."""
    temperature: float
    """Cosines are divided by it."""


@dataclass
class Matched(ModelOutput):
    """What a LabelMatcher says of a batch."""

    loss: Tensor | None = None
    """(), the mean over rows."""
    logits: Tensor | None = None
    """(B, V), cosines over the temperature."""
    losses: Tensor | None = None
    """(B,)"""
    embeddings: Tensor | None = None
    """(B, D), unit rows, float32."""


class LabelMatcher(nn.Module):
    """A text encoder with one vector a text, and the labels that these are compared with, if any.

    Args:
        encoder: an encoder of transformers, wrapped by PEFT or not, or ours.
        pooling: `mean` of the token states, or the first one's (`cls`).
    """

    label_vectors: Tensor

    def __init__(self, encoder: Any, pooling: str, labels: Labels | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.temperature = 1.0 if labels is None else labels.temperature
        vectors = torch.zeros(0, encoder.config.hidden_size) if labels is None else labels.vectors
        self.register_buffer("label_vectors", vectors.to(encoder.device), persistent=False)

    @property
    def config(self) -> Any:
        return self.encoder.config

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def base_model(self) -> Any:
        """The encoder, as a language model's `base_model` is what it has under its head."""
        return self.encoder

    def embed(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Return unit rows (B, D), float32: what sentence-transformers makes of the same tokens."""
        hidden = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state.float()
        if self.pooling == "cls":
            return F.normalize(hidden[:, 0], dim=-1)
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        taught: Tensor | None = None,
        forced_expert: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Matched:
        """Compare texts with the labels.

        Args:
            labels: (B,) numbers of labels; a negative one's row learns from `taught`.
            taught: (B, D), where the model that teaches puts each text, from `add_teacher`.
            forced_expert: (B,), as in our own models.
            use_cache: means nothing here; language models are told not to.
        """
        forced = {} if forced_expert is None else {"forced_expert": forced_expert}
        embeddings = self.embed(attention_mask, input_ids=input_ids, **forced)
        logits = embeddings @ self.label_vectors.T / self.temperature
        if labels is None:
            return Matched(logits=logits, embeddings=embeddings)
        losses = self.row_losses(embeddings, logits, labels, taught)
        return Matched(losses.mean(), logits, losses, embeddings)

    def row_losses(self, embeddings: Tensor, logits: Tensor, labels: Tensor, taught: Tensor | None) -> Tensor:
        """Return each row's loss, (B,).

        Cross-entropy to its label; without one, the divergence of its distribution over the labels from the teacher's.
        Where there are no labels at all, as when routers are trained, one less the cosine to the teacher's embedding.
        """
        losses = logits.new_zeros(len(labels))
        known = labels >= 0
        if known.any():
            losses = losses.masked_scatter(known, F.cross_entropy(logits[known], labels[known], reduction="none"))
        if taught is None or known.all():
            return losses
        if len(self.label_vectors) == 0:
            apart = 1.0 - (embeddings * taught).sum(-1)
        else:
            target = (taught @ self.label_vectors.T / self.temperature).log_softmax(-1)
            apart = F.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
        return torch.where(known, losses, apart)


@torch.no_grad()
def embed_labels(seed: LabelMatcher, tokenizer: Any, names: list[str], temperature: float) -> Labels:
    """Return the labels, their names embedded by the seed."""
    parts = []
    for first in range(0, len(names), _BATCH):
        batch = tokenizer(names[first : first + _BATCH], padding=True, truncation=True, return_tensors="pt")
        inputs = {key: batch[key].to(seed.device) for key in ("input_ids", "attention_mask")}
        parts.append(seed.eval().embed(**inputs))
    return Labels(names, torch.cat(parts), temperature)
