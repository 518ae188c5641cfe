"""Text that every Python installation carries, for demonstrations that need no download.

Each function yields rows of `id`, `text`, `corpus`, `group` (what the id's first part says) and `bucket`, a
stable number from 0 to 9, so that recipes can hold rows apart by `where`.
"""

import hashlib
import pydoc_data.topics
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

Row = dict[str, str | int]
_NAMES_A_ROW = 12


def library_source() -> Iterator[Row]:
    """Yield the standard library's modules, one row a file; `group` is the package or module."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "lib2to3", "__pycache__", "encodings"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skipped.isdisjoint(relative.parts):
            yield _row("library-source", relative.as_posix(), path.read_text(encoding="utf-8", errors="replace"))


def manual() -> Iterator[Row]:
    """Yield the topics of the language reference that `help()` shows; `group` is the topic."""
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield _row("manual", topic, text)


def unicode_names() -> Iterator[Row]:
    """Yield runs of code points with their names; `group` is the first word, mostly the script."""
    lines: list[str] = []
    start = script = ""
    for code in range(0x20, 0x20000):
        name = unicodedata.name(chr(code), "")
        if not name or name.startswith(("CJK UNIFIED", "HANGUL SYLLABLE")):
            continue
        word = name.split()[0]
        if word != script or len(lines) == _NAMES_A_ROW:
            if lines:
                yield _row("unicode-names", f"{script}/{start}", "\n".join(lines))
            lines, start, script = [], f"{code:05X}", word
        lines.append(f"U+{code:04X} {name.lower()}")
    yield _row("unicode-names", f"{script}/{start}", "\n".join(lines))


def licences() -> Iterator[Row]:
    """Yield the licence files of the installed packages; `group` is the package."""
    seen = set()
    for distribution in sorted(metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        for file in distribution.files or []:
            if file.name.upper().split(".")[0] not in ("LICENSE", "LICENCE", "COPYING", "NOTICE"):
                continue
            path = Path(str(file.locate()))
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            if text and text not in seen:
                seen.add(text)
                yield _row("licences", f"{distribution.metadata['Name']}/{file.name}", text)


CORPORA: dict[str, Callable[[], Iterator[Row]]] = {
    "library-source": library_source,
    "manual": manual,
    "unicode-names": unicode_names,
    "licences": licences,
}


def _row(corpus: str, name: str, text: str) -> Row:
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
    group = name.split("/")[0].removesuffix(".py")
    return {"id": name, "text": text, "corpus": corpus, "group": group, "bucket": bucket}
