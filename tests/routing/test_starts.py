"""Every `router.start` by its definition, on a merged model; and who can win others' traffic by what it publishes."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import tiny_dense, tiny_moe, tokens, write_adapter
from merging_tools import merge, read
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge
from test_start import K, proxies, samples, statistics
from torch.nn import functional as F

from mergekit_moe.models import load_model, read_statistics, routers_of
from mergekit_moe.router_recipe import BY_PUBLISHED, NO_PROXIES, Router, RouterTraining
from mergekit_moe.routing import seed_rows, start
from mergekit_moe.routing.start import STARTS, Material
from mergekit_moe.routing.training import fit_routers, start_routers


def test_every_start_of_the_recipe_is_known_once() -> None:
    named = get_args(Router.model_fields["start"].annotation)
    assert set(named) == STARTS.keys() | set(NO_PROXIES)
    assert not STARTS.keys() & set(NO_PROXIES)
    assert set(BY_PUBLISHED) < STARTS.keys()


@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_ridge_is_the_regression_of_one_hot_experts(shrinkage: float) -> None:
    features, owner = samples(int(torch.randint(2**31, ())))
    weights, biases = start.ridge(statistics(features, owner), shrinkage)
    alike = 1.0 / (K * torch.bincount(owner).double())[owner]
    centre = alike @ features
    deviation = (alike @ (features - centre).square()).sqrt()
    # (1 - s) X'X + s D = (1 - s) (X'X + s / (1 - s) D): sklearn's penalty on standardised features, times a factor.
    reference = Ridge(alpha=shrinkage / (1 - shrinkage))
    reference.fit((features - centre) / deviation, F.one_hot(owner).double(), sample_weight=alike)
    expected = torch.from_numpy(reference.coef_) / deviation / (1 - shrinkage)
    torch.testing.assert_close(weights[0].double(), expected, atol=1e-5, rtol=1e-5)
    intercept = 1 / K - expected @ centre
    torch.testing.assert_close(biases[0].double(), intercept, atol=1e-4, rtol=1e-4)


def publish(features: torch.Tensor, owner: torch.Tensor, folder: Path, longer: float = 1.0) -> dict[str, torch.Tensor]:
    """Write each expert's statistics as clients do, the first's sum `longer` times as long; return them as read."""
    parts = []
    for expert in range(K):
        own = features[owner == expert]
        published = {}
        for layer in range(2):
            published[f"layers.{layer}.count"] = torch.tensor(float(len(own)), dtype=torch.float64)
            published[f"layers.{layer}.sum"] = own.sum(0)
        file = folder / f"{expert}.safetensors"
        save_file(published, file)
        if expert == 0:
            changed = load_file(file)
            save_file({n: t * longer if n.endswith("sum") else t for n, t in changed.items()}, file)
        parts.append(read_statistics(file))
    stacked = {key: torch.stack([part[key] for part in parts], dim=1) for key in ("sum", "noise")}
    return {"count": torch.stack([part["count"] for part in parts]), **stacked}


def share_of_others(
    published: dict[str, torch.Tensor], name: str, features: torch.Tensor, owner: torch.Tensor
) -> float:
    """Return the share of the other experts' tokens that go to the first one."""
    sums = (published["count"], published["sum"])
    weights, biases = start.centroid(*sums, published["noise"]) if name == "centroid" else start.means(*sums)
    logits = features[owner != 0] @ weights[1].double().T + biases[1].double()
    return float((logits.argmax(-1) == 0).double().mean())


def test_who_publishes_a_longer_vector_wins_the_traffic_of_means_and_not_of_centroid(tmp_path: Path) -> None:
    features, owner = samples(int(torch.randint(2**31, ())))
    fair, longer = publish(features, owner, tmp_path), publish(features, owner, tmp_path, 10.0)
    before, after = (share_of_others(given, "centroid", features, owner) for given in (fair, longer))
    assert after <= before + 0.02
    assert share_of_others(longer, "means", features, owner) > 0.9, "the published trap"


def test_means_are_the_published_vectors_by_a_plain_dot_product(tmp_path: Path) -> None:
    features, owner = samples(4)
    published = publish(features, owner, tmp_path)
    weights, biases = start.means(published["count"], published["sum"])
    for expert in range(K):
        torch.testing.assert_close(weights[0, expert], features[owner == expert].mean(0).float())
    assert not biases.any()


@pytest.mark.parametrize("name", ["flexolmo", "hidden", "cheap-embed"])
def test_rows_of_the_seed_are_unit_length_means_one_row_at_a_time(name: str) -> None:
    seed, rows, config = tiny_dense("Llama"), proxies(), tiny_moe("Llama").config
    made = {"flexolmo": seed_rows.flexolmo, "hidden": seed_rows.hidden, "cheap-embed": seed_rows.cheap_embed}[name]
    found = made(seed, config, rows)
    sums = torch.zeros(3, 3, 32, dtype=torch.float64)
    inputs: list[torch.Tensor] = []
    for layer in seed.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for row in rows:
        inputs.clear()
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            hidden = seed(ids, output_hidden_states=True).hidden_states[:-1]
            seen = {"flexolmo": inputs, "hidden": hidden, "cheap-embed": [seed.model.embed_tokens(ids)] * 3}[name]
        sums[:, row["expert"]] += torch.stack([part[0, 1:].double().sum(0) for part in seen])
    torch.testing.assert_close(found.double(), sums / sums.norm(dim=-1, keepdim=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", STARTS)
def test_every_start_sets_the_routers_of_a_merged_model(name: str, base_folder: Path, tmp_path: Path) -> None:
    experts = [read(base_folder, write_adapter(base_folder, tmp_path / n, i), n) for i, n in enumerate("abc")]
    training = RouterTraining(max_steps=1, batch_size=2) if name == "linear" else None
    settings = Router(start=name, training=training)
    merged, out = merge(base_folder, experts, tmp_path / "merged", settings), tmp_path / "model"
    out.mkdir()
    published = {
        "count": torch.tensor([3.0, 4.0, 5.0]),
        "sum": torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(0)),
        "noise": torch.zeros(3, 3),
    }
    fit_routers(merged, proxies(30), settings, published=published, seed=0, out=out, base=base_folder)
    model = load_model(out)
    for router in routers_of(model):
        assert router.weight.isfinite().all()
        assert len(router.weight.unique(dim=0)) == 3, "each expert has a row of its own"
    assert model(tokens(), use_cache=False).logits.isfinite().all()


def test_means_are_taken_as_published_however_they_are_trained_after() -> None:
    """Not at a temperature that suits them: without renormalisation it changes what the model says (Eq. 6)."""
    model = tiny_moe("Llama", norm_topk_prob=False)
    published = {"count": torch.tensor([3.0, 4.0, 5.0]), "sum": torch.randn(3, 3, 32), "noise": torch.zeros(3, 3)}
    settings = Router(start="means", training=RouterTraining())
    start_routers(Material(model, proxies(9), settings, 0, published, None, []))
    for layer, router in enumerate(routers_of(model)):
        torch.testing.assert_close(router.weight, published["sum"][layer] / published["count"][:, None])
        assert not router.bias.any()


def test_linear_is_small_and_follows_the_seed() -> None:
    rows = [start.linear(4, 5, 100, seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert float(rows[0].std()) == pytest.approx(0.02, rel=0.1)
    model = tiny_moe("Llama")
    training = RouterTraining(max_steps=1)
    start_routers(Material(model, proxies(9), Router(start="linear", training=training), 0, {}, None, []))
    taken = torch.stack([router.weight for router in routers_of(model)])
    assert torch.equal(taken, start.linear(*taken.shape, 0)[0]), "at no temperature of ours"
