"""The paper's recipes: `check` on each file as it is, and the whole line with fewer steps, on models of their kind."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from hub_tools import environment, run_script
from loopback_hub import serve
from paper_hub import paper_hub

from mergekit_moe.recipe_file import change_recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
LANGUAGE = ["llama-3.2-3b-paper.yaml", "llama-3.1-8b-paper.yaml"]
VISION = ["clip-b32-paper.yaml", "clip-b16-paper.yaml"]
EXPERTS = dict.fromkeys(LANGUAGE, ("csqa", "cosmosqa", "socialiqa")) | dict.fromkeys(
    VISION, ("pets", "flowers", "eurosat")
)
SMALLER = {"selection": {"budget": 12}, "alignment": {"max_steps": 2}, "router": {"training": {"max_steps": 2}}}
"""All that a stand-in changes: fewer proxies and steps than the paper's."""
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
    "alignment.optimizer": "adamw",
    "alignment.learning_rate": 1e-4,
    "alignment.warmup_steps": 200,
    "alignment.scheduler": "constant_with_warmup",
    "alignment.weight_decay": 0.0,
    "router.training.epochs": 1.0,
    "router.training.learning_rate": 1e-4,
}
COMPARED = {LANGUAGE[0]: ("seed", "btm-posterior", "metamoe", "ours"), VISION[0]: ("seed", "btm", "metamoe", "ours")}
"""A recipe of each kind, and which of the table's methods its stand-in goes through, beside the experts."""
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
# One process for all: most of what a command takes on such models is to import the libraries.
_COMMANDS = """
import json, sys
from mergekit_moe import cli
for arguments in json.loads(sys.argv[1]):
    print("###", *arguments)
    sys.argv = ["metamoe", *arguments]
    try:
        cli.main()
    except SystemExit as leaving:
        if leaving.code:
            raise
"""


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return dotted path -> value of all that a recipe says."""
    if not isinstance(value, dict):
        return {path.removeprefix("."): value}
    return {key: leaf for name, inner in value.items() for key, leaf in flat(inner, f"{path}.{name}").items()}


def fields(path: Path) -> dict[str, Any]:
    return flat(load_recipe(path).model_dump(mode="json"))


def smaller(name: str, folder: Path) -> Path:
    """Write a recipe as its stand-in runs it."""
    recipe = change_recipe(load_recipe(RECIPES / name), SMALLER, "stand-in")
    path = folder / name
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All recipes checked as they are and run as stand-ins: the folder with their workspaces, and what was printed."""
    folder = tmp_path_factory.mktemp("paper")
    commands = [["check", RECIPES / name, "--workspace", folder / "checked"] for name in EXPERTS]
    commands += [["run", smaller(name, folder), "--workspace", folder / f"{name}-run"] for name in EXPERTS]
    for name, methods in COMPARED.items():
        only = ",".join([*methods, *(f"expert-{expert}" for expert in EXPERTS[name])])
        where = ["--workspace", folder / f"{name}-compared", "--seeds", "0"]
        commands.append(["compare", folder / name, *where, "--only", only])
    given = json.dumps([[str(word) for word in command] for command in commands])
    hub = paper_hub(tmp_path_factory.mktemp("hub"))
    with serve(hub):
        done = run_script(hub, _COMMANDS, environment(hub, folder / "home", COLUMNS="160"), given, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return folder, done.stdout


@pytest.mark.parametrize("name", EXPERTS)
def test_a_recipe_has_the_papers_settings(name: str) -> None:
    expected = PAPER | (LANGUAGE_PAPER if name in LANGUAGE else VISION_PAPER)
    found = fields(RECIPES / name)
    assert {key: found[key] for key in expected} == expected
    for part in ("alignment", "router.training") if name in LANGUAGE else ():
        assert found[f"{part}.batch_size"] * found[f"{part}.gradient_accumulation"] == 32


def test_recipes_of_one_kind_differ_in_their_seed_alone() -> None:
    for names, differ in ((VISION, {"base_model"}), (LANGUAGE, {"base_model", "card.license"})):
        one, other = (fields(RECIPES / name) for name in names)
        assert {key for key in one if one[key] != other[key]} == differ


@pytest.mark.parametrize("name", EXPERTS)
def test_a_recipe_as_it_is_passes_check(finished: tuple[Path, str], name: str) -> None:
    _, _, after = finished[1].partition(f"### check {RECIPES / name}")
    printed = after.partition("###")[0]
    assert fields(RECIPES / name)["base_model"] in printed
    assert re.search(r"public pool +520 rows", printed)
    assert "500 an expert, dpp" in printed
    learnt = {"flowers": 24}  # two splits
    for expert in EXPERTS[name]:
        assert f"to be trained on {learnt.get(expert, 12)} private rows; 12 held out" in printed.split(expert)[1]


@pytest.mark.parametrize("name", EXPERTS)
def test_a_stand_in_differs_from_its_recipe_in_sizes_alone(finished: tuple[Path, str], name: str) -> None:
    before, after = fields(RECIPES / name), fields(finished[0] / name)
    assert before.keys() == after.keys()
    assert {key for key in before if before[key] != after[key]} == flat(SMALLER).keys()


@pytest.mark.parametrize("name", EXPERTS)
def test_a_recipe_runs_to_the_end_on_a_model_of_its_kind(finished: tuple[Path, str], name: str) -> None:
    workspace = finished[0] / f"{name}-run"
    results = json.loads((workspace / "evaluation/results.json").read_text())
    for expert in EXPERTS[name]:
        assert 0 <= results["methods"]["unified"][expert]["accuracy"] <= 1
        proxies = json.loads((workspace / f"experts/{expert}/proxies.json").read_text())
        assert len(set(proxies["rows"])) == 12
        assert proxies["pool"]["sources"][0].startswith(fields(RECIPES / name)["public_pool.dataset"] + "@")
    config = json.loads((workspace / "model/config.json").read_text())
    assert config["model_type"] == ("metamoe_llama" if name in LANGUAGE else "metamoe_clip")
    license = fields(RECIPES / name)["card.license"]
    assert f"license: {license}" in (workspace / "model/README.md").read_text()


@pytest.mark.parametrize("name", COMPARED)
def test_a_recipe_s_table_comes_out_of_one_command(finished: tuple[Path, str], name: str) -> None:
    found = json.loads((finished[0] / f"{name}-compared/comparison/comparison.json").read_text())
    assert found["metric"] == "accuracy" and found["domains"] == list(EXPERTS[name])
    assert set(found["methods"]) == {*COMPARED[name], "oracle", *(f"expert-{expert}" for expert in EXPERTS[name])}
    for method in found["methods"].values():
        assert all(0 <= score["accuracy"] <= 1 for score in method["seeds"]["0"]["domains"].values())


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_s_configurations_leave_the_precision_to_the_recipe(path: Path) -> None:
    """The Trainer takes it from there where a recipe says nothing: the same recipe would be another training."""
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"
    assert config.num_processes == {"one-gpu.yaml": 1, "four-gpus.yaml": 4}[path.name]
