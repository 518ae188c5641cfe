"""Share of tokens that the router sends to their domain's own expert."""

from collections.abc import Sequence

import datasets
import evaluate


class RoutingAccuracy(evaluate.Metric):
    """Share of routed tokens whose first choice is their domain's expert, layer by layer and over all.

    predictions: `[layer, tokens sent to their own expert]`. references: routed tokens of that entry.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64"), length=2),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: Sequence[Sequence[int]], references: Sequence[int]) -> dict[str, object]:
        layers = 1 + max(layer for layer, _ in predictions)
        right, tokens = [0] * layers, [0] * layers
        for (layer, hits), count in zip(predictions, references, strict=True):
            right[layer] += hits
            tokens[layer] += count
        each = [hits / count for hits, count in zip(right, tokens, strict=True)]
        return {"routing_accuracy_by_layer": each, "routing_accuracy": sum(right) / sum(tokens)}
