"""Noise, sensitivity and accounting, each against an independent computation."""

import math
from collections.abc import Callable

import dp_accounting
import numpy as np
import pytest
import torch
from conftest import BOS, PROJECTIONS, randomise, tiny_dense, tokens
from datasets import Dataset
from dp_accounting.pld import PLDAccountant
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

from mergekit_moe.errors import PrivacyError
from mergekit_moe.models import adapter_silent_on
from mergekit_moe.privacy import classifier
from mergekit_moe.privacy.accounting import (
    Mechanism,
    composed_epsilon,
    gaussian_delta,
    gaussian_sigma,
    sampled_gaussian_sigma,
)
from mergekit_moe.privacy.attacks import membership, most_allowed
from mergekit_moe.privacy.ledger import build_ledger
from mergekit_moe.privacy.noise import clipped_sum
from mergekit_moe.privacy.statistics import private_statistics, text_vectors
from mergekit_moe.privacy.training import plan_training, row_losses, train_privately
from mergekit_moe.recipe import Training


def spent(sigma: float, sampling: float = 1.0, steps: int = 1, name: str = "statistics") -> Mechanism:
    return Mechanism(name, "test", 0.0, 1e-6, sigma, sampling, steps, 0.0, {})


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_the_noise_is_the_analytic_gaussians(epsilon: float, delta: float) -> None:
    """By the definition: delta is the integral of max(0, p(x) - e^eps q(x)) over the two neighbours' outputs."""
    sigma = gaussian_sigma(epsilon, delta)
    start = 0.5 + epsilon * sigma**2  # where p = e^eps q
    shape = {"limit": 200, "epsabs": 1e-15, "epsrel": 1e-10}
    by_definition = quad(
        lambda x: norm.pdf(x, 1, sigma) - math.exp(epsilon) * norm.pdf(x, 0, sigma), start, start + 15 * sigma, **shape
    )[0]
    assert by_definition == pytest.approx(delta, rel=1e-6)
    assert sigma == pytest.approx(dp_accounting.get_sigma_gaussian(epsilon, delta), rel=1e-9)
    assert gaussian_delta(epsilon, 0.999 * sigma) > delta


def test_the_composition_is_dp_accountings_and_less_than_the_sum() -> None:
    parts = [spent(3.0), spent(1.1, 0.05, 60), spent(5.0, steps=5)]
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    sampled = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.1))
    accountant.compose(dp_accounting.GaussianDpEvent(3.0))
    accountant.compose(dp_accounting.SelfComposedDpEvent(sampled, 60))
    accountant.compose(dp_accounting.GaussianDpEvent(5.0), 5)
    together = composed_epsilon(parts, 1e-6)
    assert together == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-6)
    assert together < sum(composed_epsilon([part], 1e-6) for part in parts)


def test_five_gaussian_steps_are_one_of_less_noise() -> None:
    """What the classifier's calibration leans on."""
    sigma = gaussian_sigma(2.0, 1e-6)
    assert composed_epsilon([spent(sigma * math.sqrt(5), steps=5)], 1e-6) == pytest.approx(2.0, rel=1e-3)


def test_dp_sgd_gets_the_epsilon_asked_for_and_no_less_noise_would_do() -> None:
    sigma = sampled_gaussian_sigma(4.0, 1e-6, sampling_probability=0.1, steps=20)
    assert composed_epsilon([spent(sigma, 0.1, 20)], 1e-6) <= 4.0
    assert composed_epsilon([spent(sigma * 0.995, 0.1, 20)], 1e-6) > 4.0


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-6), (-1.0, 1e-6), (math.inf, 1e-6), (1.0, 0.0), (1.0, 1.0)])
def test_no_guarantee_is_no_noise_level(epsilon: float, delta: float) -> None:
    with pytest.raises(PrivacyError, match="give an epsilon above 0 and a delta between 0 and 1"):
        gaussian_sigma(epsilon, delta)


def test_one_row_changes_a_clipped_sum_by_at_most_the_clip() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 7)) * rng.lognormal(sigma=2, size=(60, 1))
    rows[3] = 0.0
    total = clipped_sum(rows, 0.8)
    changes = [np.linalg.norm(total - clipped_sum(np.delete(rows, i, axis=0), 0.8)) for i in range(60)]
    assert max(changes) == pytest.approx(0.8, abs=1e-12), "reached, and never passed"
    assert changes[3] == 0.0


class Recorded:
    """A generator that draws nothing and keeps what it was asked for."""

    def __init__(self) -> None:
        self.scales: list[float] = []

    def normal(self, scale: float, size: int) -> NDArray[np.float64]:
        self.scales.append(scale)
        return np.zeros(size)


def unit(rows: int, size: int, seed: int, shift: float = 0.0) -> NDArray[np.float64]:
    vectors = np.random.default_rng(seed).normal(size=(rows, size))
    vectors[:, 0] += shift
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_classifiers_steps_are_those_of_the_published_algorithm() -> None:
    """Abadi et al. 2016, Algorithm 1: each gradient over max(1, norm / C), their sum, noise of sigma C, all over M."""
    private, public, clip = unit(200, 12, 0, 2.0), unit(500, 12, 1), classifier._CLIP
    recorded = Recorded()
    weights, mechanism = classifier.private_classifier(private, public, epsilon=2.0, delta=1e-6, name="a", rng=recorded)
    sigma = dp_accounting.get_sigma_gaussian(2.0, 1e-6) * math.sqrt(len(recorded.scales))
    assert recorded.scales == pytest.approx([sigma * clip] * mechanism.steps, rel=1e-9)
    assert mechanism.epsilon == pytest.approx(2.0, rel=1e-3)

    centre = public.mean(0)
    x, z = classifier.features(private, centre), classifier.features(public, centre)
    w, kept, curvature = np.zeros(13), [], np.linalg.eigvalsh(z.T @ z / len(z)).max() / 4 + classifier._RIDGE
    for _ in range(mechanism.steps):
        total = np.zeros(13)
        for row in x:
            gradient = -(1 - expit(row @ w)) * row
            total += gradient / max(1.0, float(np.linalg.norm(gradient)) / clip)
        w = w - (0.5 * total / 200 + 0.5 * (expit(z @ w)[:, None] * z).mean(0) + classifier._RIDGE * w) / curvature
        kept.append(w)
    np.testing.assert_allclose(weights, np.mean(kept[mechanism.steps // 2 :], axis=0), atol=1e-12)
    assert np.linalg.norm(x, axis=1).max() <= 1.0 + 1e-12


def test_the_noise_that_is_drawn_has_the_scale_that_is_accounted_for() -> None:
    """One row of zeros: what is published is noise alone."""
    public, draws = torch.zeros(2, 500, dtype=torch.float64), []
    for seed in range(20):
        statistics, mechanism = private_statistics(
            iter([torch.zeros(1, 2, 500)]), 100, public, clip=0.7, epsilon=2.0, delta=1e-4, name="a",
            rng=np.random.default_rng(seed),
        )  # fmt: skip
        draws += [statistics[f"layers.{layer}.sum"].numpy() for layer in (0, 1)]
    scale = 0.7 * dp_accounting.get_sigma_gaussian(2.0, 1e-4)
    assert np.std(draws) == pytest.approx(scale, rel=0.02)
    assert mechanism.noise_multiplier * 0.7 == pytest.approx(scale, rel=1e-9)
    assert statistics["layers.1.noise_variance"] == pytest.approx((scale / 100) ** 2, rel=1e-9)
    assert abs(np.corrcoef(draws[0], draws[1])[0, 1]) < 0.2, "layers have noise of their own"


def test_statistics_are_means_of_texts_and_clip_all_layers_together() -> None:
    public = torch.full((2, 3), 0.5, dtype=torch.float64)
    vectors = torch.randn(4000, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    expected = (vectors - 0.5) * (1.0 / (vectors - 0.5).flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
    statistics, _ = private_statistics(
        iter(vectors.split(7)), 4000, public, clip=1.0, epsilon=1.0, delta=1e-6, name="a", rng=Recorded()
    )
    for layer in (0, 1):
        mean = statistics[f"layers.{layer}.sum"] / statistics[f"layers.{layer}.count"]
        torch.testing.assert_close(mean, expected.mean(0)[layer] + 0.5)


def test_a_texts_vector_is_the_mean_over_its_own_tokens() -> None:
    model = tiny_dense()
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (4, 9)]
    got = torch.cat(list(text_vectors(model, Dataset.from_list([{"input_ids": r, "labels": r} for r in rows]), [BOS])))
    for row, vector in zip(rows, got, strict=True):
        inputs: list[torch.Tensor] = []
        handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda m, a, inputs=inputs: inputs.append(a[0]))
        with torch.no_grad():
            model(input_ids=torch.tensor([row]))
        handle.remove()
        torch.testing.assert_close(vector[1], inputs[0][0, 1:].double().mean(0), atol=1e-5, rtol=0)


def too_little(call: Callable[[], object]) -> str:
    with pytest.raises(PrivacyError) as error:
        call()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_too_few_rows_are_refused_with_the_noise_to_signal() -> None:
    public = torch.zeros(16, 2048, dtype=torch.float64)
    ratio = dp_accounting.get_sigma_gaussian(2.0, 1e-6) * math.sqrt(16 * 2048) / 100
    said = too_little(lambda: private_statistics(iter([]), 100, public, clip=1.0, epsilon=2.0, delta=1e-6, name="law"))
    assert f"expert 'law', privacy.statistics: 100 private rows at epsilon 2 give {ratio:.2f} times as much" in said
    said = too_little(
        lambda: classifier.private_classifier(unit(20, 384, 0), unit(50, 384, 1), epsilon=1.0, delta=1e-6, name="law")
    )
    assert "times as much noise as there can be signal" in said


@pytest.mark.parametrize("rows", [10, 11])
def test_a_delta_that_allows_to_publish_a_row_is_refused(rows: int) -> None:
    said = too_little(
        lambda: classifier.private_classifier(unit(rows, 4, 0), unit(50, 4, 1), epsilon=8.0, delta=0.1, name="law")
    )
    assert "privacy.delta is 0.1" in said


def lora() -> tuple[torch.nn.Module, list[torch.nn.Parameter]]:
    model = get_peft_model(tiny_dense(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=list(PROJECTIONS)))
    randomise(model)
    return model, [p for p in model.parameters() if p.requires_grad]


def rows_of(count: int) -> Dataset:
    made = [tokens(1, 5 + i % 4, seed=i)[0].tolist() for i in range(count)]
    return Dataset.from_list([{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in made])


@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_dp_sgd_without_noise_follows_the_sum_of_clipped_gradients_of_single_rows(clip: float) -> None:
    """Opacus against autograd, row by row, BOS silent, more rows than fit in one batch: one step of plain AdamW."""
    rows = rows_of(10)
    settings = Training(max_steps=1, batch_size=4, learning_rate=1e-2, scheduler="constant")
    plan = spent(0.0, 1.0, 1, "expert")._replace(parameters={"clip": clip, "rows_with_proxies": 10})
    model, trained = lora()
    with adapter_silent_on(model, [BOS]):
        train_privately(model, rows, settings, plan, name="a")
    reference, expected = lora()
    total = [torch.zeros_like(p) for p in expected]
    with adapter_silent_on(reference, [BOS]):
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
            gradients = torch.autograd.grad(row_losses(reference, batch).sum(), expected)
            length = torch.cat([g.flatten() for g in gradients]).norm()
            for kept, gradient in zip(total, gradients, strict=True):
                kept += gradient * min(1.0, clip / float(length)) / 10
    optimizer = torch.optim.AdamW(expected, lr=1e-2, weight_decay=0.0)
    for parameter, gradient in zip(expected, total, strict=True):
        parameter.grad = gradient
    optimizer.step()
    for parameter, wanted, gradient in zip(trained, expected, total, strict=True):
        large = gradient.abs() > 1e-5  # Adam's first step is a sign: rounding decides where there is no gradient
        torch.testing.assert_close(parameter[large], wanted[large], atol=2e-5, rtol=0)
    assert not any(hasattr(p, "grad_sample") and p.grad_sample is not None for p in trained)


def test_dp_sgds_noise_is_the_multiplier_times_the_clip() -> None:
    """Rows with nothing to learn: the gradient that AdamW sees is noise over the expected batch."""
    rows = Dataset.from_list([{"input_ids": [BOS, 5, 6], "labels": [-100] * 3}] * 8)
    settings = Training(max_steps=1, batch_size=8, learning_rate=0.5, scheduler="constant")
    model, trained = lora()
    before = [p.detach().clone() for p in trained]
    seen: list[torch.Tensor] = []
    plain = torch.optim.AdamW.step

    def look(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        seen.extend(p.grad.flatten().clone() for group in self.param_groups for p in group["params"])
        return plain(self, *args, **kwargs)

    plan = spent(1.5, 1.0, 1, "expert")._replace(parameters={"clip": 0.2, "rows_with_proxies": 8})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", look)
        train_privately(model, rows, settings, plan, name="a")
    assert float(torch.cat(seen).std()) == pytest.approx(1.5 * 0.2 / 8, rel=0.06)
    assert all(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))


def test_an_experts_plan_counts_rows_steps_and_refuses_where_noise_is_all() -> None:
    model, _ = lora()
    counts = {"rows": 4000, "private_rows": 3000}
    settings = Training(epochs=1.0, batch_size=200)
    plan = plan_training(model, settings, **counts, epsilon=8.0, delta=1e-6, clip=1.0, name="law")
    assert (plan.steps, plan.sampling_probability) == (20, 0.05)
    assert plan.epsilon <= 8.0
    few = {"rows": 40, "private_rows": 30}
    said = too_little(
        lambda: plan_training(
            model, settings.model_copy(update={"batch_size": 4}), **few, epsilon=1.0, delta=1e-6, clip=1.0, name="law"
        )
    )
    assert "expert 'law', privacy.expert: 40 rows, proxies among them, at epsilon 1" in said


def test_a_file_that_the_ledger_does_not_know_is_refused() -> None:
    settings = {"delta": 1e-6, "proxies_depend": True, "expert_on_proxies": True, "private_statistics": False}
    with pytest.raises(PrivacyError, match=r"surprise\.bin: not in the privacy ledger"):
        build_ledger(["expert.json", "surprise.bin"], {}, **settings)


def test_membership_counts_what_it_says() -> None:
    found = membership([3.0, 2.0, 0.5, -1.0], list(np.linspace(-2, 1, 200)))
    assert found["tpr_at_1pct_fpr"] == 0.5
    assert membership([1.0] * 5, [0.0] * 5)["auc"] == 1.0
    assert most_allowed(0.0, 0.0) == pytest.approx(0.01)
    assert most_allowed(math.log(2), 1e-3) == pytest.approx(0.021)
