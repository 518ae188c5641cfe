"""Encoders as classifiers: a text or an image has the label whose name lies nearest (CLIP's protocol).

Label names are embedded once, by the seed, and stay where they are: experts that are trained apart share one target
space. The own tower of what is classified is the seed's, an expert's or the unified model's.

Shapes: B rows, T tokens, D embedding size, V labels.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

PROJECTED, CLASSIFIED = "projected", "classified"
_BATCH = 64


class Labels(NamedTuple):
    """What a text or image can be."""

    names: list[str]
    vectors: Tensor
    """(V, D), unit rows, float32: the names, as the seed embeds them."""
    temperature: float
    """Cosines are divided by it."""
    biases: Tensor | None = None
    """(V,), of a classifier: `vectors` are then the rows of its head, and there is no temperature."""


@dataclass
class Matched(ModelOutput):
    """What a LabelMatcher says of a batch."""

    loss: Tensor | None = None
    """(), the mean over rows."""
    logits: Tensor | None = None
    """(B, V), cosines over the temperature, or what a classifier's head says."""
    losses: Tensor | None = None
    """(B,)"""
    embeddings: Tensor | None = None
    """(B, D), unit rows, float32."""


class LabelMatcher(nn.Module):
    """An encoder with one vector a text or image, and the labels that these are compared with, if any.

    Args:
        encoder: an encoder of transformers, wrapped by PEFT or not, or ours.
        pooling: `mean` of the token states, or the first one's (`cls`); `projected` of two towers, each of which
            projects its own vector into a space that they share; `classified` of images, with a head over labels in
            place of their names: that of `labels`, or else the encoder's own, which may train.
    """

    label_vectors: Tensor
    label_biases: Tensor

    def __init__(self, encoder: Any, pooling: str, labels: Labels | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.temperature = 1.0 if labels is None else labels.temperature
        vectors = torch.zeros(0, self.size) if labels is None else labels.vectors
        biases = None if labels is None else labels.biases
        self.register_buffer("label_vectors", vectors.to(encoder.device), persistent=False)
        biases = torch.zeros(len(vectors)) if biases is None else biases
        self.register_buffer("label_biases", biases.to(encoder.device), persistent=False)

    @property
    def config(self) -> Any:
        return self.encoder.config

    @property
    def size(self) -> int:
        """D."""
        return self.config.projection_dim if self.pooling == PROJECTED else self.config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def base_model(self) -> Any:
        """The encoder, as a language model's `base_model` is what it has under its head."""
        return self.encoder

    def embed(self, **inputs: Tensor) -> Tensor:
        """Return unit rows (B, D), float32: of tokens what sentence-transformers makes of them, or of pixels."""
        return F.normalize(self.pooled(**inputs), dim=-1)

    def pooled(self, **inputs: Tensor) -> Tensor:
        """Return (B, D), float32, as long as they come."""
        if self.pooling == PROJECTED:
            tower = self.encoder.get_image_features if "pixel_values" in inputs else self.encoder.get_text_features
            return tower(**inputs).pooler_output.float()
        hidden = body_of(self.encoder)(**inputs).last_hidden_state.float()
        if self.pooling in ("cls", CLASSIFIED):
            return hidden[:, 0]
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)

    def logits(self, pooled: Tensor) -> Tensor:
        """Return (B, V)."""
        if self.pooling == CLASSIFIED and len(self.label_vectors) == 0 and hasattr(self.encoder, "classifier"):
            return self.encoder.classifier(pooled.to(self.encoder.dtype)).float()
        seen = pooled if self.pooling == CLASSIFIED else F.normalize(pooled, dim=-1)
        return seen @ self.label_vectors.T / self.temperature + self.label_biases

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        taught: Tensor | None = None,
        forced_expert: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Matched:
        """Compare texts, or images by their pixels, with the labels.

        Args:
            labels: (B,) numbers of labels; a negative one's row learns from `taught`.
            taught: (B, D), where the model that teaches puts each row, from `add_teacher`.
            forced_expert: (B,), as in our own models.
            use_cache: means nothing here; language models are told not to.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        given |= {"forced_expert": forced_expert}
        pooled = self.pooled(**{name: value for name, value in given.items() if value is not None})
        embeddings, logits = F.normalize(pooled, dim=-1), self.logits(pooled)
        if labels is None:
            return Matched(logits=logits, embeddings=embeddings)
        losses = self.row_losses(embeddings, logits, labels, taught)
        return Matched(losses.mean(), logits, losses, embeddings)

    def row_losses(self, embeddings: Tensor, logits: Tensor, labels: Tensor, taught: Tensor | None) -> Tensor:
        """Return each row's loss, (B,).

        Cross-entropy to its label; without one, the divergence of its distribution over the labels from the teacher's.
        Where there are no labels at all, as when routers are trained, or a head of its own is all that a classifier
        knows of them, one less the cosine to the teacher's embedding.
        """
        losses = logits.new_zeros(len(labels))
        known = labels >= 0
        if known.any():
            losses = losses.masked_scatter(known, F.cross_entropy(logits[known], labels[known], reduction="none"))
        if taught is None or known.all():
            return losses
        if len(self.label_vectors) == 0 or self.pooling == CLASSIFIED:
            apart = 1.0 - (embeddings * taught).sum(-1)
        else:
            target = (taught @ self.label_vectors.T / self.temperature).log_softmax(-1)
            apart = F.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
        return torch.where(known, losses, apart)


def body_of(network: Any) -> Any:
    """Return the part of a transformers model whose layers can take experts: an image tower, what is under a head."""
    for name in ("vision_model", "vit"):
        if hasattr(network, name):
            return getattr(network, name)
    return network


def embed_labels(seed: LabelMatcher, tokenizer: Any, names: list[str], temperature: float) -> Labels:
    """Return the labels, their names embedded by the seed."""
    return Labels(names, embed_texts(seed, tokenizer, names), temperature)


@torch.no_grad()
def embed_texts(seed: LabelMatcher, tokenizer: Any, texts: list[str]) -> Tensor:
    """Return (N, D) unit rows, float32."""
    parts = []
    for first in range(0, len(texts), _BATCH):
        batch = tokenizer(texts[first : first + _BATCH], padding=True, truncation=True, return_tensors="pt")
        inputs = {key: batch[key].to(seed.device) for key in ("input_ids", "attention_mask")}
        parts.append(seed.eval().embed(**inputs))
    return torch.cat(parts)
