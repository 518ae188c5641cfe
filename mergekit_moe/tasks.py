"""Rows as questions: the choices and the right one, or the text that is to be written."""

import string
from collections.abc import Callable
from typing import Any

from mergekit_moe.recipe import ClientRows, DataSource
from mergekit_moe.task_recipe import Choices, Generation

TASK_COLUMNS = ("completions", "right", "answer")
"""Of choices the first two: each choice's completion, and the number of the right one. Else the text to be written."""
CHOICE = "choice"
"""What stands for a choice's text in a template."""


def task_of(source: DataSource) -> Choices | Generation | None:
    return source.task if isinstance(source, ClientRows) else None


def task_features(source: DataSource) -> dict[str, Any]:
    """Return the types of the columns that `task_cells` fills."""
    from datasets import Sequence, Value

    task = task_of(source)
    if isinstance(task, Choices):
        return {"completions": Sequence(Value("string")), "right": Value("int64")}
    return {} if task is None else {"answer": Value("string")}


def columns_asked(source: DataSource) -> tuple[list[str], list[str]]:
    """Return the columns that a source's task names, and its templates."""
    task = task_of(source)
    if task is None:
        return [], []
    if not isinstance(task, Choices):
        return [], [task.answer]
    if isinstance(task.choices, str):
        return [task.answer, task.choices], []
    return [task.answer], task.choices


def task_cells(source: DataSource, row: dict[str, Any], render: Callable[..., str]) -> dict[str, Any]:
    """Return what a row holds for its source's task, and the right choice's text as `choice`.

    Args:
        render: turns a template and a row into text.

    Raises:
        ValueError: if the row has no choices, or none of them is said to be right.
    """
    task = task_of(source)
    if task is None:
        return {}
    if not isinstance(task, Choices):
        return {"answer": render(task.answer, row)}
    texts, labels = _choices(task, row, render)
    right = _right_choice(row[task.answer], texts, labels, task)
    completions = [render(source.completion, {**row, CHOICE: text}) for text in texts]
    return {"completions": completions, "right": right, CHOICE: texts[right]}


def _choices(task: Choices, row: dict[str, Any], render: Callable[..., str]) -> tuple[list[str], list[str]]:
    """Return the choices' texts; and their labels, where the column holds both, as many data sets on the Hub do."""
    labels: list[str] = []
    if isinstance(task.choices, list):
        texts = [render(template, row) for template in task.choices]
    else:
        cell = row[task.choices]
        if isinstance(cell, dict):
            labels, cell = [str(label) for label in cell.get("label") or []], cell.get("text")
        if not isinstance(cell, list) or len(cell) < 2:
            raise ValueError(f"column '{task.choices}' holds no list of at least two choices")
        texts = [render(f"{{{CHOICE}}}", {CHOICE: text}) for text in cell]
    if not all(text.strip() for text in texts):
        raise ValueError("one of its choices has no text")
    return texts, labels


def _right_choice(answer: Any, texts: list[str], labels: list[str], task: Choices) -> int:
    letters = list(string.ascii_uppercase[: len(texts)])
    numbers = [str(task.first + place) for place in range(len(texts))]
    # A number counts, unless it is a label; as text it may be a choice's own.
    kinds = (labels, numbers) if isinstance(answer, int) else (labels, texts, letters, numbers)
    name = str(int(answer)) if isinstance(answer, bool) else str(answer).strip()
    for names in ([each.strip() for each in kind] for kind in kinds):
        if name in names:
            return names.index(name)
    raise ValueError(
        f"column '{task.answer}' holds {answer!r}, which is none of the {len(texts)} choices; "
        f"give a choice's text, its number from {task.first}, or its letter from A"
    )
