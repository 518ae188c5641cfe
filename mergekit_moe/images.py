"""Rows that hold images: a file's bytes as they are stored, and pixels only when a batch is made of them."""

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from datasets import Dataset, Features
    from numpy.typing import NDArray
    from PIL.Image import Image

IMAGE = "image"
"""The column that holds a row's image."""
_WITHOUT_RANGE = ("I", "F")
"""Pillow's modes whose numbers may be of any size: to cut them at 255, as Pillow would, may leave nothing but white."""


def has_images(rows: "Dataset") -> bool:
    return IMAGE in rows.column_names


def undecoded(rows: Any, column: str) -> Any:
    """Return a data set whose images in `column` come as they are stored, where they are kept as images."""
    from datasets import Image

    features: Features = rows.features or {}
    return rows.cast_column(column, Image(decode=False)) if isinstance(features.get(column), Image) else rows


def image_cell(value: Any, column: str) -> dict[str, Any] | None:
    """Return a cell as an `Image` feature keeps it, without the path that it came from; None for an empty one.

    Args:
        value: a file's bytes, or `bytes` and `path`.

    Raises:
        ValueError: if it is nothing that Pillow reads as an image.
    """
    if value is None:
        return None
    path = value.get("path") if isinstance(value, dict) else None
    content = value.get("bytes") if isinstance(value, dict) else value
    named = f"column '{column}' ({path.rpartition('/')[2]})" if path else f"column '{column}'"
    if content is None and path:
        content = _read(path, named)
    if not isinstance(content, bytes):
        raise ValueError(
            f"{named} holds {type(content).__name__}; an image is the bytes of a PNG or JPEG file, or an Image of "
            "`datasets`"
        )
    _require_image(content, named)
    return {"bytes": content, "path": None}


def _read(path: str, named: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{named} can't be read: {error.strerror or error}") from None


def _require_image(content: bytes, named: str) -> None:
    """Raise ValueError unless Pillow can read the file to its end."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode in _WITHOUT_RANGE:
                raise ValueError(f"its numbers ({image.mode}) have no known black and white; save it with 8 or 16 bits")
            image.draft("RGB", (32, 32))  # a JPEG at an eighth of its size is read to its end, too, in less time
            image.load()
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        reason = "it is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"{named} holds a broken image: {reason}; leave the row out by 'where'") from None


def decode(content: bytes) -> "Image":
    """Return an image file's pixels in RGB, the right way up; the file was looked at when its row was read."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):  # Pillow would cut at 255 what goes up to 65,535: all white
            image = Image.fromarray((np.asarray(image) / 257.0).round().astype(np.uint8))
        return image.convert("RGB")


@dataclass(frozen=True)
class ImageReader:
    """A model's own image processor, as what turns rows into its inputs: when they are read, and not before.

    So a pool's pixels never lie in memory at once. Two of one folder are equal, by which `datasets` knows their rows
    for rows of one kind.
    """

    folder: Path

    def __call__(self, rows: "Mapping[str, list[Any]]") -> dict[str, list[Any]]:
        """Return columns as they are, but for `pixel_values` (C, H, W) in place of the image."""
        kept = {name: values for name, values in rows.items() if name != IMAGE}
        if IMAGE not in rows:
            return kept
        return {**kept, "pixel_values": list(self.pixels([decode(cell["bytes"]) for cell in rows[IMAGE]]))}

    def pixels(self, images: "list[Image]") -> "NDArray[np.float32]":
        """Return (B, C, H, W)."""
        return _processor(self.folder)(images, return_tensors="np")["pixel_values"]

    def read(self, rows: "Dataset") -> "Dataset":
        """Return rows whose images are pixels as soon as they are read; other columns stay."""
        return undecoded(rows, IMAGE).with_transform(self)


@functools.cache
def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    # Pillow's, also where torchvision is installed: the two resize a little differently.
    return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, backend="pil")
