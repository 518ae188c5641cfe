"""Images that installed packages carry, or that can be drawn with what they carry: no download either.

Each function yields rows of `id`, `image` (a PNG file's bytes), `name` (what it shows), `corpus`, `group` and `bucket`,
a stable number from 0 to 9, so that recipes can hold rows apart by `where`. Rows are the same on every run; drawn ones
depend on the versions of Pillow and of the fonts, as text does on those of its packages.
"""

import hashlib
import io
import math
import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

Row = dict[str, str | int | bytes]

FONTS = (
    *("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Oblique"),
    *("DejaVuSerif", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralItalic"),
)
"""Of those that come with matplotlib, the ones that map code points as Unicode does."""
SCRIPTS = {
    "digits": ((0x30, 0x3A),),
    "latin": ((0x41, 0x5B), (0x61, 0x7B)),
    "greek": ((0x391, 0x3AA), (0x3B1, 0x3CA)),
    "cyrillic": ((0x410, 0x450),),
    "armenian": ((0x531, 0x557), (0x561, 0x587)),
    "hebrew": ((0x5D0, 0x5EB),),
    "arabic": ((0x621, 0x63B), (0x641, 0x64B)),
    "georgian": ((0x10D0, 0x10F1),),
    "symbols": ((0x2190, 0x219A), (0x2200, 0x2240), (0x25A0, 0x25D0), (0x2640, 0x2668)),
}
"""Group -> ranges of code points."""
_DRAWN = 32
"""Pixels a side."""
_COARSE = (8, 12, 16, 24, _DRAWN)
"""Pixels a side that a glyph is drawn with before it is shown at `_DRAWN`."""
_DRAWINGS = 3
"""Of a glyph in each font."""
_CROPS = 500
"""Of each photograph."""


def digits() -> Iterator[Row]:
    """Yield scikit-learn's handwritten digits, 8 x 8, light on dark; `group` is the digit, a fifth is `test`."""
    from PIL import Image
    from sklearn.datasets import load_digits

    loaded = load_digits()
    for number, (grey, digit) in enumerate(zip(loaded.images, loaded.target, strict=True)):
        image = Image.fromarray((grey * 255 / 16).round().astype("uint8"))  # 16 is full ink
        row = _row("digits", str(digit), str(number), unicodedata.name(str(digit)).lower(), image)
        yield row | {"split": "test" if int(row["bucket"]) < 2 else "train"}


def glyphs() -> Iterator[Row]:
    """Yield letters, digits and symbols of matplotlib's fonts, each drawn a few times; `group` is the script.

    `character` is what is drawn, beside its Unicode name.
    """
    for font in FONTS:
        drawn = _characters(font)
        for group, ranges in SCRIPTS.items():
            for code in (code for start, end in ranges for code in range(start, end) if code in drawn):
                for k in range(_DRAWINGS):
                    name = f"{code:04X}/{font}/{k}"
                    image, shown = _draw(chr(code), font, name), unicodedata.name(chr(code)).lower()
                    yield _row("glyphs", group, name, shown, image) | {"character": chr(code)}


def photographs() -> Iterator[Row]:
    """Yield square crops, of all sizes, of scikit-learn's and matplotlib's sample photographs; `group` is the file."""
    from PIL import Image

    for name, path in _photograph_files().items():
        with Image.open(path) as file:
            photograph = file.convert("RGB")
        for k in range(_CROPS):
            chance = random.Random(f"{path.stem}/{k}")
            side = round(min(photograph.size) * math.exp(chance.uniform(math.log(0.1), 0)))
            left, top = (chance.randint(0, length - side) for length in photograph.size)
            crop = photograph.crop((left, top, left + side, top + side)).resize((2 * _DRAWN, 2 * _DRAWN))
            yield _row("photographs", path.stem, f"{path.stem}/{k}", name, crop)


CORPORA: dict[str, Callable[[], Iterator[Row]]] = {"digits": digits, "glyphs": glyphs, "photographs": photographs}


def _photograph_files() -> dict[str, Path]:
    """Return what each photograph shows, and where it is."""
    import matplotlib
    import sklearn.datasets

    from_sklearn = Path(sklearn.datasets.__file__).parent / "images"
    return {
        "photo of a temple": from_sklearn / "china.jpg",
        "photo of a flower": from_sklearn / "flower.jpg",
        "photo of an officer": Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
    }


def _font_file(font: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"


def _characters(font: str) -> set[int]:
    from matplotlib.ft2font import FT2Font

    return set(FT2Font(str(_font_file(font))).get_charmap())


def _draw(character: str, font: str, name: str) -> "Image.Image":
    """Return a glyph, its size, place, angle, colours and coarseness by the hash of `name`."""
    from PIL import Image, ImageDraw, ImageFont

    chance = random.Random(name)
    big = 2 * _DRAWN
    typeface = ImageFont.truetype(str(_font_file(font)), round(big * chance.uniform(0.5, 0.95)))
    ink = Image.new("L", (big, big))
    place = (big * chance.uniform(0.42, 0.58), big * chance.uniform(0.42, 0.58))
    ImageDraw.Draw(ink).text(place, character, fill=255, font=typeface, anchor="mm")
    ink = ink.rotate(chance.uniform(-20, 20), Image.Resampling.BILINEAR)
    coarse = chance.choice(_COARSE)
    ink = ink.resize((coarse, coarse), Image.Resampling.BOX).resize((_DRAWN, _DRAWN), Image.Resampling.BICUBIC)
    paper, pen = _colours(chance)
    return Image.composite(Image.new("RGB", ink.size, pen), Image.new("RGB", ink.size, paper), ink)


def _colours(chance: random.Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return those of paper and pen: half of them black on white, a quarter white on black, else any."""
    kind = chance.random()
    if kind < 0.5:
        return (255, 255, 255), (0, 0, 0)
    if kind < 0.75:
        return (0, 0, 0), (255, 255, 255)
    light, dark = ([chance.randint(low, low + 95) for _ in range(3)] for low in (160, 0))
    paper, pen = (light, dark) if chance.random() < 0.5 else (dark, light)
    return (paper[0], paper[1], paper[2]), (pen[0], pen[1], pen[2])


def _row(corpus: str, group: str, row_id: str, name: str, image: "Image.Image") -> Row:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0)  # then no version of zlib has a say in a row's bytes
    bucket = int(hashlib.sha256(row_id.encode()).hexdigest(), 16) % 10
    shown: Row = {"id": row_id, "image": file.getvalue(), "name": name}
    return shown | {"corpus": corpus, "group": group, "bucket": bucket}
