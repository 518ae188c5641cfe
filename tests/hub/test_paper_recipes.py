"""The paper's recipes: `check` on each file as it is, and the whole line with fewer steps, on models of their kind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from hub_tools import metamoe
from loopback_hub import Hub, serve
from paper_hub import language_hub, vision_hub

from mergekit_moe.recipe_file import change_recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
LANGUAGE = ["llama-3.2-3b-paper.yaml", "llama-3.1-8b-paper.yaml"]
VISION = ["clip-b32-paper.yaml", "clip-b16-paper.yaml"]
SMALLER = {"selection": {"budget": 12}, "alignment": {"max_steps": 2}, "router": {"training": {"max_steps": 2}}}
"""All that a stand-in changes: less than a real run takes, of everything else the same."""
PAPER = {
    "selection.candidates": 3000,
    "selection.budget": 500,
    "alignment.rank": 16,
    "alignment.alpha": 32.0,
    "alignment.epochs": 10.0,
    "merge.top_k": 1,
    "comparison.seeds": [0, 1, 2],
}
LANGUAGE_PAPER = {
    "alignment.learning_rate": 1e-4,
    "alignment.warmup_steps": 200,
    "alignment.scheduler": "constant_with_warmup",
    "alignment.weight_decay": 0.0,
    "router.training.epochs": 1.0,
    "router.training.learning_rate": 1e-4,
}

VISION_PAPER = {
    "alignment.optimizer": "sgd",
    "alignment.momentum": 0.9,
    "alignment.learning_rate": 0.01,
    "alignment.weight_decay": 1e-4,
    "alignment.batch_size": 128,
    "alignment.scheduler": "constant",
    "alignment.warmup_steps": 0,
    "router.training.optimizer": "sgd",
    "router.training.learning_rate": 0.001,
    "router.training.epochs": 5.0,
    "selection.epsilon": 0.0,
}


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return dotted path -> value of all that a recipe says."""
    if not isinstance(value, dict):
        return {path.removeprefix("."): value}
    return {key: leaf for name, inner in value.items() for key, leaf in flat(inner, f"{path}.{name}").items()}


def fields(path: Path) -> dict[str, Any]:
    return flat(load_recipe(path).model_dump(mode="json"))


def smaller(name: str, folder: Path) -> Path:
    """Write a recipe with smaller steps, next to nothing else of it changed."""
    recipe = change_recipe(load_recipe(RECIPES / name), SMALLER, "stand-in")
    path = folder / name
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    before, after = fields(RECIPES / name), fields(path)
    assert {key for key in before if before[key] != after[key]} == flat(SMALLER).keys()
    return path


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    made = language_hub(tmp_path_factory.mktemp("models"))
    with serve(made):
        yield made


@pytest.fixture(scope="module")
def image_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    made = vision_hub(tmp_path_factory.mktemp("image-models"))
    with serve(made):
        yield made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all tests' downloads lie."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_recipe_has_the_papers_settings(name: str) -> None:
    found = fields(RECIPES / name)
    assert {key: found[key] for key in PAPER | LANGUAGE_PAPER} == PAPER | LANGUAGE_PAPER
    for part in ("alignment", "router.training"):
        assert found[f"{part}.batch_size"] * found[f"{part}.gradient_accumulation"] == 32


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_recipe_as_it_is_passes_check(hub: Hub, home: Path, tmp_path: Path, name: str) -> None:
    done = metamoe(hub, home, "check", RECIPES / name, "--workspace", tmp_path / "ws", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert "500 an expert, dpp, by sentence-transformers/all-MiniLM-L6-v2" in done.stdout
    for expert in ("csqa", "cosmosqa", "socialiqa"):
        assert f"expert {expert}" in done.stdout
    assert "to be trained on 12 private rows; 12 held out" in done.stdout


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_recipe_runs_to_the_end_on_a_model_of_its_kind(hub: Hub, home: Path, tmp_path: Path, name: str) -> None:
    path, workspace = smaller(name, tmp_path), tmp_path / "ws"
    done = metamoe(hub, home, "run", path, "--workspace", workspace)
    assert done.returncode == 0, done.stderr
    results = json.loads((workspace / "evaluation/results.json").read_text())
    for domain in ("csqa", "cosmosqa", "socialiqa"):
        assert 0 <= results["methods"]["unified"][domain]["accuracy"] <= 1
        proxies = json.loads((workspace / f"experts/{domain}/proxies.json").read_text())
        assert proxies["pool"]["sources"][0].startswith("tatsu-lab/alpaca@")
    config = json.loads((workspace / "model/config.json").read_text())
    assert [expert["name"] for expert in config["experts"]] == ["csqa", "cosmosqa", "socialiqa"]
    assert config["router_context"] == "prompt"
    license = fields(path)["card.license"]
    assert f"license: {license}" in (workspace / "model/README.md").read_text()


@pytest.mark.parametrize("name", VISION)
def test_an_image_recipe_has_the_papers_settings(name: str) -> None:
    found = fields(RECIPES / name)
    assert {key: found[key] for key in PAPER | VISION_PAPER} == PAPER | VISION_PAPER


def test_recipes_of_one_kind_differ_in_their_seed_alone() -> None:
    for names, differ in ((VISION, {"base_model"}), (LANGUAGE, {"base_model", "card.license"})):
        one, other = (fields(RECIPES / name) for name in names)
        assert {key for key in one if one[key] != other[key]} == differ


@pytest.mark.parametrize("name", VISION)
def test_an_image_recipe_as_it_is_passes_check(image_hub: Hub, home: Path, tmp_path: Path, name: str) -> None:
    done = metamoe(image_hub, home, "check", RECIPES / name, "--workspace", tmp_path / "ws", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    for rows in ("12 private rows; 12 held out", "24 private rows; 12 held out"):
        assert f"to be trained on {rows}" in done.stdout


@pytest.mark.parametrize("name", VISION)
def test_an_image_recipe_runs_to_the_end_on_a_tiny_clip(image_hub: Hub, home: Path, tmp_path: Path, name: str) -> None:
    path, workspace = smaller(name, tmp_path), tmp_path / "ws"
    done = metamoe(image_hub, home, "run", path, "--workspace", workspace)
    assert done.returncode == 0, done.stderr
    results = json.loads((workspace / "evaluation/results.json").read_text())
    for domain in ("pets", "flowers", "eurosat"):
        assert 0 <= results["methods"]["unified"][domain]["accuracy"] <= 1
        proxies = json.loads((workspace / f"experts/{domain}/proxies.json").read_text())
        assert proxies["pool"]["sources"][0].startswith("benjamin-paine/imagenet-1k-256x256@")
    assert json.loads((workspace / "model/config.json").read_text())["model_type"] == "metamoe_clip"


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_its_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    assert config.num_processes >= 1
