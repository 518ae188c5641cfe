"""Closed-form routers against scikit-learn and by what they must not let happen."""

import itertools

import numpy as np
import pytest
import torch
from conftest import tiny_dense, tiny_moe, tokens
from datasets import Dataset
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from mergekit_moe.errors import DataError
from mergekit_moe.models import recorded_ffn_inputs, recorded_routers, routers_of
from mergekit_moe.routing import start
from mergekit_moe.routing.statistics import RoutingStatistics, gather_statistics, router_feature

K, H = 3, 6


def samples(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    owner = torch.arange(K).repeat_interleave(torch.tensor([100, 200, 400]))
    means = 5.0 + torch.randn(K, H, generator=generator, dtype=torch.float64)
    mixing = torch.randn(K, H, H, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(owner), 1, H, generator=generator, dtype=torch.float64)
    return means[owner] + (noise @ mixing[owner])[:, 0], owner


def statistics(features: torch.Tensor, owner: torch.Tensor) -> RoutingStatistics:
    apart = [features[owner == k] for k in range(K)]
    total = torch.stack([own.sum(0) for own in apart])
    second = torch.stack([own.T @ own / len(own) for own in apart]).mean(0)
    return RoutingStatistics(torch.bincount(owner).double(), total[None], second[None])


def test_lda_decides_as_scikit_learn_does() -> None:
    features, owner = samples(int(np.random.default_rng().integers(2**31)))
    weights, biases = start.lda(statistics(features, owner), shrinkage=0.0)
    logits = features @ weights[0].double().T + biases[0].double()
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / K] * K).fit(features, owner)
    expected = torch.from_numpy(reference.decision_function(features))
    torch.testing.assert_close(logits.softmax(-1), expected.softmax(-1), atol=1e-3, rtol=0)


def test_shrunk_all_the_way_each_dimension_stands_for_itself() -> None:
    """Against naive Bayes with the experts' mean variances, by its densities."""
    features, owner = samples(int(np.random.default_rng().integers(2**31)))
    weights, biases = start.lda(statistics(features, owner), shrinkage=1.0)
    logits = features @ weights[0].double().T + biases[0].double()
    apart = [features[owner == k] for k in range(K)]
    variance = torch.stack([own.var(0, correction=0) for own in apart]).mean(0)
    densities = torch.stack([-0.5 * ((features - own.mean(0)).square() / variance).sum(1) for own in apart], dim=1)
    torch.testing.assert_close(logits.softmax(-1), densities.softmax(-1), atol=1e-3, rtol=0)


def test_a_covariance_without_inverse_is_refused() -> None:
    features, owner = samples(3)
    features[:, 1] = features[:, 0]
    flat = statistics(features - 5.0, owner)
    flat.second[:, :, 1], flat.second[:, 1] = flat.second[:, :, 0].clone(), flat.second[:, 0].clone()
    flat.second -= 1e-9 * torch.eye(H).double()
    with pytest.raises(DataError, match=r"has no inverse.*raise router.shrinkage"):
        start.lda(flat, 0.0)
    assert all(tensor.isfinite().all() for tensor in start.lda(flat, 0.1))


def test_centroid_is_the_nearest_mean_whatever_the_norms() -> None:
    features, owner = samples(3)
    found = statistics(features, owner)
    weights, biases = start.centroid(found.count, found.total)
    means = found.total[0] / found.count[:, None]
    nearest = torch.cdist(features, means).argmin(-1)
    assert torch.equal((features @ weights[0].double().T + biases[0].double()).argmax(-1), nearest)


def test_scaling_one_published_vector_does_not_win_the_traffic() -> None:
    features, owner = samples(3)
    found = statistics(features, owner)
    scaled = found.total.clone()
    scaled[:, 0] *= 10
    weights, biases = start.centroid(found.count, scaled)
    others = features[owner != 0] @ weights[0].double().T + biases[0].double()
    assert (others.argmax(-1) == 0).double().mean() < 0.05


def proxies(rows: int = 12) -> Dataset:
    lengths = [4 + i % 5 for i in range(rows)]
    ids = [tokens(1, n, seed=i)[0].tolist() for i, n in enumerate(lengths)]
    return Dataset.from_list([{"input_ids": x, "labels": x, "expert": i % 3} for i, x in enumerate(ids)])


@pytest.mark.parametrize("context_weight", [0.0, 0.7])
@pytest.mark.parametrize("seed", [None, tiny_dense("Llama", seed=3).eval()], ids=["own path", "own and seed's path"])
def test_statistics_are_exact_sums_however_they_are_batched(
    context_weight: float, seed: torch.nn.Module | None
) -> None:
    """Against the definition, one row at a time: each down its own expert's path, and the seed's; BOS left out."""
    model, rows = tiny_moe("Llama"), proxies()
    found = gather_statistics(model, rows, context_weight=context_weight, batch_size=5, seed=seed)
    count, total, gram = torch.zeros(3), torch.zeros(3, 3, 32).double(), torch.zeros(3, 3, 32, 32).double()
    paths = [(model, ["forced_expert"])] + ([] if seed is None else [(seed, [])])
    with torch.no_grad():
        for row, (path, takes) in itertools.product(rows, paths):
            forced = {name: torch.tensor([row["expert"]]) for name in takes}
            with recorded_ffn_inputs(path) as inputs:
                path(torch.tensor([row["input_ids"]]), **forced)
            for layer, hidden in enumerate(inputs):
                hidden = hidden[0, 1:].double()
                mean = hidden.cumsum(0) / torch.arange(1, len(hidden) + 1)[:, None]
                feature = (1 - context_weight) * hidden + context_weight * mean
                total[layer, row["expert"]] += feature.sum(0)
                gram[layer, row["expert"]] += feature.T @ feature
            count[row["expert"]] += len(row["input_ids"]) - 1
    assert torch.equal(found.count.float(), count)
    torch.testing.assert_close(found.total, total, atol=1e-4, rtol=0)
    second = (gram / count[:, None, None]).mean(1)
    torch.testing.assert_close(found.second, second, atol=1e-4, rtol=0)


def test_the_router_is_linear_in_the_feature_that_it_was_fitted_on() -> None:
    model = tiny_moe("Llama")
    for router in routers_of(model):
        router.context_logit.data.fill_(0.4)
    with recorded_routers(model) as calls, torch.no_grad():
        model(tokens())
        for call, router in zip(calls, routers_of(model), strict=True):
            feature = router_feature(call, float(torch.sigmoid(torch.tensor(0.4))))
            expected = feature @ router.weight.T + router.bias
            routed = call.routing.token_mask
            torch.testing.assert_close(call.logits[routed], expected[routed], atol=1e-5, rtol=0)
