"""What a domain's held-out rows ask of a model, and how many of the answers are right."""

from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_moe.evaluation.choices import Losses, judge_choices
from mergekit_moe.evaluation.generation import judge_generation
from mergekit_moe.recipe import Evaluation
from mergekit_moe.task_recipe import Choices, Generation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


class Questions(NamedTuple):
    """Held-out rows with a task."""

    rows: "Dataset"
    """With the columns of the task: see `data.load_rows`."""
    task: Choices | Generation
    tokenizer: Any


def judge(
    model: "PreTrainedModel", questions: Questions, settings: Evaluation, *, losses: Losses | None = None
) -> dict[str, float]:
    """Return `accuracy`, and for choices `accuracy_normalised`.

    Args:
        losses: of several models that vote. They choose, but write nothing: then there is no accuracy.
    """
    rows, task, tokenizer = questions
    if isinstance(task, Choices):
        return judge_choices(model, tokenizer, rows, settings, losses=losses)
    return judge_generation(model, tokenizer, rows, task, settings) if losses is None else {}
