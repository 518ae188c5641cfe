"""DP-SGD by Opacus: a client's expert, of which any one private row can change little.

Abadi et al. 2016, Algorithm 1: at each step every row takes part with the same probability, its gradient is clipped,
and the sum is noised. Opacus computes and clips the gradients of single rows; the accounting is `accounting`'s.
"""

import math
import secrets
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mergekit_moe.data import IGNORED, collate
from mergekit_moe.errors import PrivacyError
from mergekit_moe.privacy.accounting import (
    Mechanism,
    account,
    require_few_enough,
    require_signal,
    sampled_gaussian_sigma,
)
from mergekit_moe.privacy.noise import fresh_generator, noise_to_signal
from mergekit_moe.recipe import Training
from mergekit_moe.training import optimizer_of

if TYPE_CHECKING:
    from datasets import Dataset

_LOGGED = 20
"""Entries of the log."""


def plan_training(
    model: torch.nn.Module,
    settings: Training,
    *,
    rows: int,
    private_rows: int,
    epsilon: float,
    delta: float,
    clip: float,
    name: str,
) -> Mechanism:
    """Return the mechanism that training will be: its noise, its sampling, its steps.

    Args:
        model: its parameters that require gradients are those that train.
        rows: private rows and proxies, before any of them is found to have nothing to learn.
        private_rows: how many of them are private.
        name: the expert's name, for errors.

    Raises:
        PrivacyError: if delta allows to publish a row, or there are too few rows for the epsilon.
    """
    who = f"expert '{name}', privacy.expert"
    require_few_enough(delta, private_rows, who=who)
    batch = settings.batch_size * settings.gradient_accumulation
    probability = min(1.0, batch / rows)
    steps = settings.max_steps if settings.max_steps > 0 else math.ceil(settings.epochs * rows / batch)
    sigma = sampled_gaussian_sigma(epsilon, delta, sampling_probability=probability, steps=steps)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ratio = noise_to_signal(sigma, size, rows=probability * rows, steps=steps)
    require_signal(ratio, epsilon, rows, what=who, kind="rows, proxies among them,")
    mechanism = Mechanism(
        name="expert",
        mechanism="DP-SGD: Gaussian mechanism on clipped gradients of a Poisson sample, each step (Abadi et al. 2016)",
        epsilon=epsilon,
        delta=delta,
        noise_multiplier=sigma,
        sampling_probability=probability,
        steps=steps,
        noise_to_signal=ratio,
        parameters={"clip": clip, "rows": private_rows, "rows_with_proxies": rows, "numbers": size},
    )
    return account(mechanism)


def train_privately(
    model: Any, tokens: "Dataset", settings: Training, plan: Mechanism, *, name: str
) -> list[dict[str, float]]:
    """Train `model` in place as planned; return the log, whose losses are not private and stay with the client.

    Args:
        tokens: columns `input_ids` and `labels`; rows with nothing to learn may be missing, and then add nothing.

    Raises:
        PrivacyError: if Opacus isn't installed.
    """
    from transformers import get_scheduler

    grad_sample_module, dp_optimizer = _opacus(name)
    trained = [p for p in model.parameters() if p.requires_grad]
    kind, arguments = optimizer_of(settings)
    optimizer = dp_optimizer(
        kind(trained, weight_decay=settings.weight_decay, **arguments),
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.parameters["clip"],
        expected_batch_size=plan.sampling_probability * plan.parameters["rows_with_proxies"],
        generator=torch.Generator(trained[0].device).manual_seed(secrets.randbits(63)),
    )
    scheduler = get_scheduler(settings.scheduler, optimizer.original_optimizer, settings.warmup_steps, plan.steps)
    sampling, log = fresh_generator(), []
    wrapped = grad_sample_module(model.train(), loss_reduction="sum")
    with warnings.catch_warnings():
        # Opacus hooks layers whose inputs need no gradients, as those of a frozen model's first ones.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        for step in range(plan.steps):
            picked = (sampling.random(len(tokens)) < plan.sampling_probability).nonzero()[0].tolist()
            loss = _step(wrapped, optimizer, trained, [tokens[i] for i in picked], settings.batch_size)
            scheduler.step()
            if (step + 1) % max(1, plan.steps // _LOGGED) == 0 and picked:
                log.append({"step": step + 1, "loss": loss})
    wrapped.to_standard_module()
    return log


def _step(wrapped: Any, optimizer: Any, trained: list[Any], rows: list[Any], most: int) -> float:
    """Take one step on the rows, at most `most` of them in memory at once; return their mean loss."""
    total, parts = 0.0, [rows[i : i + most] for i in range(0, len(rows), most)] or [[]]
    for number, part in enumerate(parts):
        if part:
            batch = {key: value.to(trained[0].device) for key, value in collate(part).items()}
            losses = row_losses(wrapped, batch)
            losses.sum().backward()
            total += float(losses.sum().detach())
        else:  # nobody was drawn: the step is noise alone, for to leave it out would tell
            for parameter in trained:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        optimizer.signal_skip_step(do_skip=number + 1 < len(parts))
        optimizer.step()
        optimizer.zero_grad()
    return total / max(1, len(rows))


def row_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return (B,) each row's mean loss over the tokens that it learns, or an encoder's over its label, nats."""
    if batch["labels"].ndim == 1:
        return model(**batch).losses
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    return losses.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)


def _opacus(name: str) -> tuple[Any, Any]:
    try:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer
    except ImportError:
        raise PrivacyError(
            f"expert '{name}', privacy.expert: Opacus is not installed; `pip install 'mergekit_moe[privacy]'`, or drop "
            "privacy.expert"
        ) from None
    return GradSampleModule, DPOptimizer
