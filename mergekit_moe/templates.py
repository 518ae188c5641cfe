"""How a row becomes text: by a template with its columns' names in braces."""

import functools
import string
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """Some text of a template, and the cell that follows it, if any."""

    text: str
    column: str | None
    part: int | None
    """Which part of a cell that holds a path, counted from 0; None for the whole cell."""


def render(template: str, row: dict[str, Any]) -> str:
    """Return a template with a row's cells in the places of their columns' names.

    Raises:
        TypeError: if a cell is nothing that can be shown.
        ValueError: if a cell has too few parts.
    """
    # Not str.format: it would take a dot in a column's name for an attribute.
    return "".join(piece.text + _shown(piece, row) for piece in parts(template))


@functools.cache
def parts(template: str) -> list[Piece]:
    """Return a template's pieces."""
    parsed = string.Formatter().parse(template)
    return [Piece(text, column, int(part) if part else None) for text, column, part, _ in parsed]


def _shown(piece: Piece, row: dict[str, Any]) -> str:
    if piece.column is None:
        return ""
    cell = _as_text(row[piece.column])
    if piece.part is None:
        return cell
    found = cell.split("/")[piece.part : piece.part + 1]
    if not found:
        raise ValueError(f"{{{piece.column}:{piece.part}}} is no part of {cell!r}; parts lie between slashes, from 0")
    return found[0]


def _as_text(value: Any) -> str:
    """Return a cell as text; a dialogue (pairs of speaker and utterance, or chat messages) one line a turn.

    Choices with their labels, as CommonsenseQA and ARC hold them, are one line each, such as "A. ignore".
    """
    if value is None:
        return ""
    if isinstance(value, dict) and value.keys() == {"label", "text"}:
        value = [f"{label}. {text}" for label, text in zip(value["label"], value["text"], strict=True)]
    if isinstance(value, list):
        return "\n".join(_as_turn(turn) for turn in value)
    if not isinstance(value, str | int | float):
        raise TypeError(
            f"a template takes text, numbers, choices or a list of turns, and this cell holds {type(value).__name__}"
        )
    return str(value)


def _as_turn(turn: Any) -> str:
    if isinstance(turn, dict):
        turn = [turn.get("role", turn.get("from", "")), turn.get("content", turn.get("value", ""))]
    return ": ".join(map(str, turn)) if isinstance(turn, list) else _as_text(turn)


def chunks(text: str, size: int | None) -> list[str]:
    """Split text at line ends into pieces of at most `size` characters; a longer line is cut."""
    if not text.strip():
        return []
    if size is None:
        return [text]
    pieces = [""]
    for line in text.splitlines(keepends=True):
        for part in (line[i : i + size] for i in range(0, len(line), size)):
            if len(pieces[-1]) + len(part) > size:
                pieces.append("")
            pieces[-1] += part
    return [piece for piece in pieces if piece.strip()]
