"""Routing statistics of the private rows themselves, differentially private.

Each row is one vector: over all layers, the mean of the seed model's FFN input over the row's tokens, less the same of
the public pool. The seed model has seen no private row, so that a row enters by its own vector and nothing else.
Shapes: B rows of a batch, L layers, H hidden size.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mergekit_moe.data import batches
from mergekit_moe.models import counted_tokens, recorded_ffn_inputs, scored_inputs
from mergekit_moe.privacy.accounting import Mechanism, account, gaussian_sigma, require_few_enough, require_signal
from mergekit_moe.privacy.noise import clipped_sum, fresh_generator, gaussian, noise_to_signal

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_BATCH = 16


@torch.no_grad()
def text_vectors(model: "PreTrainedModel", tokens: "Dataset", silent_tokens: list[int]) -> Iterator[Tensor]:
    """Yield (B, L, H) float64: each row's mean FFN input in every layer, without padding and the silent tokens."""
    for batch in batches(tokens, _BATCH, model.device):
        with recorded_ffn_inputs(model) as inputs:
            model(**scored_inputs(model, batch), use_cache=False)
        counted = counted_tokens(batch, inputs[0], silent_tokens)
        weight = counted.double() / counted.sum(1, keepdim=True).clamp(min=1)
        yield torch.stack([(hidden.double() * weight[:, :, None]).sum(1) for hidden in inputs], dim=1).cpu()


def public_reference(vectors: Iterator[Tensor]) -> tuple[Tensor, float]:
    """Return the public rows' mean (L, H), and the median norm of what is left of a row without it.

    Args:
        vectors: of public rows, from `text_vectors`.
    """
    rows = torch.cat(list(vectors))
    mean = rows.mean(dim=0)
    return mean, float((rows - mean).flatten(1).norm(dim=1).median())


def private_statistics(
    vectors: Iterator[Tensor],
    rows: int,
    public_LH: Tensor,
    *,
    clip: float,
    epsilon: float,
    delta: float,
    name: str,
    rng: np.random.Generator | None = None,
) -> tuple[dict[str, Tensor], Mechanism]:
    """Return routing statistics of private rows, and what they cost.

    The vectors of a row are clipped together, over all layers, so that one Gaussian mechanism covers all of them.
    `count` is the number of rows, which counts as known: to noise it would only add to the error of the mean.

    Args:
        vectors: of private rows, from `text_vectors`; rows without a token to read may be missing.
        rows: how many private rows there are.
        public_LH: mean of public rows; it is added back, for it is public.
        clip: greatest norm of a row's vector; never to be taken from private rows.
        name: the expert's name, for errors.
        rng: the noise's; by default fresh from the operating system, and anything else is for tests.

    Returns:
        For each layer `count` () and `sum` (H,), as `publication.write_statistics` names them, and `noise_variance` (),
        the variance of each number of sum / count that is noise; float64.

    Raises:
        PrivacyError: if delta allows to publish a row, or there are too few rows for the epsilon.
    """
    who = f"expert '{name}', privacy.statistics"
    require_few_enough(delta, rows, who=who)
    sigma = gaussian_sigma(epsilon, delta)
    ratio = noise_to_signal(sigma, public_LH.numel(), rows=rows)
    require_signal(ratio, epsilon, rows, what=who)
    total = np.zeros(public_LH.numel())
    for batch in vectors:
        total += clipped_sum((batch - public_LH).flatten(1).numpy(), clip)
    total += gaussian(len(total), sigma * clip, rng or fresh_generator())
    mean = public_LH.double() + torch.from_numpy(total).reshape(public_LH.shape) / rows
    statistics = {}
    for layer in range(len(mean)):
        statistics[f"layers.{layer}.count"] = torch.tensor(float(rows), dtype=torch.float64)
        statistics[f"layers.{layer}.sum"] = mean[layer] * rows
        statistics[f"layers.{layer}.noise_variance"] = torch.tensor((sigma * clip / rows) ** 2, dtype=torch.float64)
    mechanism = Mechanism(
        name="statistics",
        mechanism="Gaussian mechanism on the sum of clipped vectors, all layers together (Balle and Wang 2018)",
        epsilon=epsilon,
        delta=delta,
        noise_multiplier=sigma,
        sampling_probability=1.0,
        steps=1,
        noise_to_signal=ratio,
        parameters={"clip": clip, "rows": rows, "numbers": math.prod(public_LH.shape), "unit": "mean FFN input"},
    )
    return statistics, account(mechanism)
