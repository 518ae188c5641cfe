"""How much of an expert's gain over the seed a unified model keeps."""

from collections.abc import Sequence

import datasets
import evaluate


class Retention(evaluate.Metric):
    """(seed - ours) / (seed - own expert), losses in nats a token: 1 keeps all, 0 is the seed, below 0 is worse.

    predictions: our loss on each domain. references: `[seed's loss, own expert's loss]` on each domain.
    None where the own expert is no better than the seed: there is no gain to keep. The mean is over the others.
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
