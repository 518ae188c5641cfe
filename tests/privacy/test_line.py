"""The whole line with every mechanism on: what is published, what the ledger says, what a unifier makes of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
import yaml
from dp_accounting.pld import PLDAccountant
from safetensors.torch import load_file
from test_pipeline import assert_no_leak, tiny_recipe

NAMES = ("cooking", "sailing", "algebra")
PRIVACY = {
    "delta": 1e-5,
    "relevance": {"epsilon": 2.0},
    "statistics": {"private": True, "epsilon": 2.0},
    "expert": {"epsilon": 8.0, "clip": 0.5},
}
Command = Callable[..., tuple[int, str, str]]


def private_recipe(folder: Path, privacy: dict[str, Any] | None = None, **changes: Any) -> Path:
    recipe = tiny_recipe(folder)
    values = yaml.safe_load(recipe.read_text())
    values["alignment"]["batch_size"] = 24
    values["router"] = {"start": "centroid", "training": None}
    values["privacy"] = PRIVACY if privacy is None else privacy
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value}
    recipe.write_text(yaml.safe_dump(values))
    return recipe


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run with everything noised: the recipe and the workspace."""
    from test_pipeline import metamoe

    folder = tmp_path_factory.mktemp("private")
    recipe = private_recipe(folder)
    metamoe("run", recipe, "--workspace", folder / "ws")
    return recipe, folder / "ws"


def ledger_of(workspace: Path, name: str) -> dict[str, Any]:
    return json.loads((workspace / "experts" / name / "privacy.json").read_text())


def test_the_ledger_lists_every_file_of_a_published_folder_and_no_other(published: tuple[Path, Path]) -> None:
    for name in NAMES:
        files = {path.name for path in (published[1] / "experts" / name).iterdir()}
        listed = [artifact["file"] for artifact in ledger_of(published[1], name)["artifacts"]]
        assert set(listed) == files
        assert len(listed) == len(files)


def test_with_every_mechanism_on_the_whole_folder_is_private_and_the_total_is_the_accountants(
    published: tuple[Path, Path],
) -> None:
    ledger = ledger_of(published[1], "cooking")
    assert {a["file"]: a["guarantee"] for a in ledger["artifacts"]} == {
        "README.md": "public",
        "adapter_config.json": "public",
        "adapter_model.safetensors": "dp",
        "expert.json": "public",
        "manifest.json": "dp",
        "privacy.json": "public",
        "proxies.json": "dp",
        "routing_statistics.safetensors": "dp",
    }
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for spent in ledger["mechanisms"]:
        event = dp_accounting.GaussianDpEvent(spent["noise_multiplier"])
        if spent["sampling_probability"] < 1:
            event = dp_accounting.PoissonSampledDpEvent(spent["sampling_probability"], event)
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, spent["steps"]))
        assert spent["epsilon"] <= {"relevance": 2.0, "statistics": 2.0, "expert": 8.0}[spent["name"]] * 1.001
    assert ledger["total"]["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-3)
    assert 8.0 < ledger["total"]["epsilon"] < 12.0, "more than any mechanism alone, less than their sum"


def test_published_statistics_are_the_noised_ones(published: tuple[Path, Path]) -> None:
    statistics = load_file(published[1] / "experts" / "sailing" / "routing_statistics.safetensors")
    assert set(statistics) == {f"layers.{i}.{key}" for i in (0, 1) for key in ("count", "sum", "noise_variance")}
    assert statistics["layers.0.count"] in (range(50, 61))


def test_nothing_published_tells_of_private_text_or_of_this_machine(published: tuple[Path, Path]) -> None:
    assert_no_leak(published[0].parent, published[1], ("experts", "model"))


def test_a_published_manifest_names_no_digest_of_private_rows(published: tuple[Path, Path]) -> None:
    """Who can guess the rows could tell by their digest that the guess was right."""
    home = json.loads((published[1] / "aligned" / "cooking" / "manifest.json").read_text())["inputs"]["private"]
    for path in (published[1] / "experts").rglob("*.json"):
        assert home not in path.read_text()


def test_noise_does_not_come_from_the_recipes_seed(published: tuple[Path, Path], tmp_path: Path, command: Any) -> None:
    """The seed is published: who could draw the noise again would subtract it."""
    recipe, first = published
    code, _, error = command("select", recipe, "--workspace", tmp_path)
    assert code == 0, error
    chosen = [
        json.loads((folder / "proxies" / "algebra" / "selection.json").read_text())["relevance"]
        for folder in (first, tmp_path)
    ]
    assert chosen[0] != chosen[1]


def test_without_privacy_the_ledger_promises_residency_alone(tmp_path: Path, command: Command) -> None:
    recipe = private_recipe(tmp_path, {}, selection={"relevance": "prompts"})
    values = yaml.safe_load(recipe.read_text())
    values["experts"] = values["experts"][:1]
    values["experts"][0]["client"]["prompts"] = ["simmer the onion in butter"]
    recipe.write_text(yaml.safe_dump(values))
    for verb in ("select", "seed", "align", "publish"):
        code, _, error = command(verb, recipe, "--workspace", tmp_path / "ws")
        assert code == 0, error
    ledger = ledger_of(tmp_path / "ws", "cooking")
    guarantees = {a["file"]: a["guarantee"] for a in ledger["artifacts"]}
    assert guarantees["adapter_model.safetensors"] == "residency"
    assert guarantees["routing_statistics.safetensors"] == "residency", "made through the expert"
    assert guarantees["proxies.json"] == "public", "picked by sentences that describe the domain"
    assert ledger["total"] == {"guarantee": "residency", "epsilon": None, "delta": None, "mechanisms": []}
    assert set(guarantees) == {path.name for path in (tmp_path / "ws" / "experts" / "cooking").iterdir()}


@pytest.mark.parametrize(
    ("privacy", "changes", "message"),
    [
        ({"relevance": {"epsilon": 0}}, {}, "privacy.relevance.epsilon: input should be greater than 0, got 0"),
        ({"relevance": {"epsilon": 1}, "delta": 0}, {}, "privacy.delta: input should be greater than 0, got 0"),
        ({"relevance": {"epsilon": 1}, "delta": 1}, {}, "privacy.delta: input should be less than 1, got 1"),
        ({"statistics": {"epsilon": 1}}, {}, "statistics of proxies take no noise; set 'private: true'"),
        ({"statistics": {"private": True}}, {}, "sums over private rows, which need noise; give 'epsilon'"),
        ({"expert": {"epsilon": 4}}, {}, "privacy.expert trains on proxies that were picked without noise"),
        ({"relevance": {"epsilon": 1}}, {"selection": {"alpha": "auto"}}, "selection 'auto' judges by private rows"),
        ({"relevance": {"epsilon": 1}}, {"selection": {"shorten": True}}, "selection.shorten judges by private rows"),
        ({"relevance": {"epsilon": 1}}, {"selection": {"relevance": "centroid"}}, "selection.relevance is centroid"),
        ({"relevance": {"epsilon": 1}}, {"selection": {"duplicate_cosine": 0.9}}, "which no noise hides; drop it"),
        ({"relevance": {"epsilon": 1}, "delta": 0.1}, {}, "publishing a row at random would pass as private: lower it"),
        ({"relevance": {"epsilon": 0.5}}, {}, "times as much noise as there can be signal"),
    ],
)
def test_what_can_not_be_promised_is_one_sentence(
    tmp_path: Path, command: Command, privacy: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    recipe = private_recipe(tmp_path, privacy, **changes)
    code, _, error = command("select", recipe, "--workspace", tmp_path / "ws")
    assert code == 2
    assert len(error.splitlines()) == 1
    assert message in error
    assert not list((tmp_path / "ws").rglob("mechanism.json"))


def test_a_clients_own_privacy_wins_over_the_recipes(tmp_path: Path) -> None:
    from mergekit_moe.recipe_file import load_recipe

    recipe = private_recipe(tmp_path)
    values = yaml.safe_load(recipe.read_text())
    values["experts"][0]["client"]["privacy"] = {"statistics": {"private": True, "epsilon": 1}}
    recipe.write_text(yaml.safe_dump(values))
    loaded = load_recipe(recipe)
    assert loaded.privacy_of(loaded.experts[0]).relevance is None
    assert loaded.privacy_of(loaded.experts[1]).relevance is not None


def test_a_noisier_mean_is_sent_no_less() -> None:
    """Noise makes a mean longer, and so its bias lower; the published variance takes that back, on average."""
    from mergekit_moe.routing.start import centroid

    generator = torch.Generator().manual_seed(0)
    means, size = torch.zeros(1, 2, 64, dtype=torch.float64), 64
    means[0, 0, 0], means[0, 1, 1] = 1.0, 1.0
    variance = torch.tensor([[0.25, 0.0]], dtype=torch.float64)
    corrected, plain = [], []
    for _ in range(400):
        noised = means + variance.sqrt()[:, :, None] * torch.randn(1, 2, size, generator=generator, dtype=torch.float64)
        for given, kept in ((variance, corrected), (None, plain)):
            bias = centroid(torch.ones(2, dtype=torch.float64), noised, given)[1][0]
            kept.append(float(bias[0] - bias[1]))
    assert abs(sum(corrected) / 400) < 0.2
    assert sum(plain) / 400 < -7.0
