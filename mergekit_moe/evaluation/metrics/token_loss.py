"""Language-modelling loss per token, and its perplexity."""

import math
from collections.abc import Sequence

import datasets
import evaluate


class TokenLoss(evaluate.Metric):
    """Mean negative log-likelihood in nats per learnt token, over all rows together.

    predictions: summed loss of each row, in nats. references: number of learnt tokens of each row.
    Not a mean of row means: a long row weighs as much as its tokens.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, float]:
        loss = math.fsum(predictions) / sum(references)
        return {"loss": loss, "perplexity": math.exp(loss)}
