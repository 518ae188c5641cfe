"""The base model's own image tower as an embedder, beside those of sentence-transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_moe.images import ImageReader
from mergekit_moe.matching import embed_texts
from mergekit_moe.models import load_model, load_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BATCH = 32


class SeedTower:
    """Embeds images; by a model of two towers sentences that describe them, too, into the space that they share."""

    max_seq_length = None

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder).eval()
        self.reader = ImageReader(folder)
        self.folder = folder

    @torch.no_grad()
    def encode(self, given: Sequence[Any], **_: Any) -> "NDArray[np.float32]":
        """Return (N, D) unit rows of images of Pillow, or of texts."""
        if isinstance(given[0], str):
            return embed_texts(self.model, load_tokenizer(self.folder), list(given)).cpu().numpy()
        parts = []
        for at in range(0, len(given), _BATCH):
            pixels = torch.from_numpy(self.reader.pixels(list(given[at : at + _BATCH])))
            parts.append(self.model.embed(pixel_values=pixels.to(self.model.device)).cpu())
        return torch.cat(parts).numpy()
