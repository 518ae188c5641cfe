"""How much of an expert's gain over the seed a unified model keeps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import evaluate


class Retention(evaluate.Metric):
    """(seed - ours) / (seed - own expert), of losses in nats a token or of shares of wrong answers.

    1 keeps all, 0 is the seed, below 0 is worse. predictions: ours on each domain. references: `[the seed's, the own
    expert's]` on each domain. None where the own expert is no better than the seed: there is no gain to keep. The mean
    is over the others.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Sequence(datasets.Value("float64"), length=2),
                }
            ),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[Sequence[float]]) -> dict[str, object]:
        each = [
            (seed - ours) / (seed - own) if own < seed else None
            for ours, (seed, own) in zip(predictions, references, strict=True)
        ]
        defined = [value for value in each if value is not None]
        return {"retention": each, "mean_retention": sum(defined) / len(defined) if defined else None}


def judged_by(scores: Iterable[Mapping[str, Any]]) -> str:
    """Return what domains of these scores are judged by: `accuracy` where all have labels or a task, else `loss`."""
    return "accuracy" if all("accuracy" in score for score in scores) else "loss"


def what_is_lost(score: Mapping[str, Any], metric: str) -> float:
    """Return the loss, or the share of wrong answers."""
    return float(1.0 - score["accuracy"] if metric == "accuracy" else score["loss"])
