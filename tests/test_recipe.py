"""Recipes: every shipped one parses, and every mistake is one sentence that names file and field."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_moe.errors import RecipeError
from mergekit_moe.recipe import Seed
from mergekit_moe.recipe_file import change_recipe, load_recipe

_ALL = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))
RECIPES = [path for path in _ALL if path.parent.name != "accelerate"]
CLIENT = {"private": {"dataset": "a.jsonl", "text": "{text}"}}
GOOD: dict[str, Any] = {
    "base_model": "org/seed",
    "public_pool": {"dataset": "pool.jsonl", "text": "{text}"},
    "experts": [{"name": "law", "source": "org/law"}, {"name": "code", "client": CLIENT}],
}


def load(tmp_path: Path, **changes: Any) -> Any:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return load_recipe(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_parses(path: Path) -> None:
    recipe = load_recipe(path)
    assert len(recipe.experts) >= 2
    for name, changes in recipe.comparison.ablations.items():
        assert change_recipe(recipe, changes, name) != recipe


def test_the_first_three_keys_make_a_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert recipe.base_model == "org/seed"
    assert recipe.selection.budget == 500
    assert recipe.data_dir == str(tmp_path)


def test_a_seed_to_be_trained_is_told_from_a_name(tmp_path: Path) -> None:
    assert isinstance(load(tmp_path, base_model={"layers": 2}).base_model, Seed)


def test_the_data_folder_on_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "data_dir": "here"}))
    assert load_recipe(path).data_dir == str(tmp_path / "here")
    assert load_recipe(path, tmp_path / "there").data_dir == str(tmp_path / "there")


def test_a_client_may_lie_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "client.yaml").write_text(yaml.safe_dump(CLIENT))
    experts = [GOOD["experts"][0], {"name": "code", "client": "client.yaml"}]
    assert load(tmp_path, experts=experts).experts[1].client.private.dataset == "a.jsonl"


def test_recipes_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path).seed = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selektion": {}}, "unknown key 'selektion'; did you mean 'selection'?"),
        ({"selection": {"budgt": 3}}, "selection: unknown key 'budgt'; did you mean 'budget'?"),
        ({"base_model": {"layer": 3}}, "base_model: unknown key 'layer'; did you mean 'layers'?"),
        ({"public_pool": {"datset": "x", "text": "{t}"}}, "public_pool: unknown key 'datset'; did you mean 'dataset'?"),
        ({"zzz": 1}, "unknown key 'zzz'; allowed are base_model, revision, public_pool"),
        ({"selection": {"budget": 0}}, "selection.budget: input should be greater than or equal to 1, got 0"),
        (
            {"selection": {"method": "k-means", "shorten": True}},
            "'shorten' keeps the first picks, and k-means picks all",
        ),
        ({"selection": {"method": "dppp"}}, "selection.method: input should be 'dpp', 'auto', "),
        ({"public_pool": {"text": "{t}"}}, "public_pool: give either 'dataset' or 'installed'"),
        ({"public_pool": {"dataset": "x"}}, "public_pool: give 'text', or 'prompt' and 'completion'"),
        ({"experts": []}, "experts: list should have at least 1 item"),
        ({"experts": 5}, "experts: input should be a valid list, got 5"),
        ({"experts": [{"name": "soup", "source": "x/y"}]}, "expert name 'soup' is a row of the results table"),
        ({"experts": [{"name": "x", "source": "x/y", "license": "mit"}]}, "expert 'x': 'license' means nothing here"),
        ({"experts": [{"name": "x", "client": CLIENT, "test": CLIENT["private"]}]}, "'test' means inside 'client'"),
        ({"alignment": {"scheduler": "cosinee"}}, "alignment.scheduler: input should be 'linear', 'cosine'"),
        ({"public_pool": {"dataset": "x", "text": "{q"}}, "public_pool: template '{q'"),
        ({"public_pool": {"dataset": "x", "text": "{q:d}"}}, "a brace holds a column's name and nothing else"),
        ({"public_pool": {"dataset": "x", "text": "f({q}) }"}}, "double a brace that is meant as such"),
        ({"experts": [GOOD["experts"][0]] * 2}, "expert name 'law' is used more than once"),
        ({"experts": [GOOD["experts"][0], {"name": "x"}]}, "expert 'x': give either 'source' or 'client'"),
        ({"experts": [GOOD["experts"][0], {"name": "A b", "source": "x/y"}]}, "experts.1.name: string should match"),
        ({"merge": {"top_k": 3}}, "merge.top_k is 3 but there are 2 experts"),
        (
            {"router": {"start": "linear", "training": None}},
            "router: router.start linear is random until it is trained",
        ),
        ({"router": {"start": "means"}, "merge": {"anchor": True}}, "merge.anchor's publishes nothing"),
        ({"router": {"start": "lad"}}, "router.start: input should be 'uniform', 'random', 'arrow', 'lda', 'ridge', "),
        ({"router": {"training": {"task_weight": 0, "domain_weight": 0}}}, "every loss has weight 0"),
        ({"router": {"start": "centroid", "leave_out_ambiguous": True}}, "'leave_out_ambiguous' is for lda and ridge"),
        ({"router": {"training": {"trains": "all"}}}, "router.training.trains: input should be 'router' or 'router+"),
        ({"base_model": None}, "base_model: "),
        ({"base_model": {"layers": 2}, "revision": "main"}, "'revision' is for a base model on the Hub"),
    ],
)
def test_a_mistake_is_one_sentence_naming_file_and_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(tmp_path, **changes)
    assert f"{tmp_path / 'r.yaml'}: " in str(error.value)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_several_mistakes_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load(tmp_path, seed="x", merge={"top_k": 0})
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["- a\n", "a: [", "", "\x00", "seed: 2024-13-45"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load_recipe(path)


def test_a_missing_recipe_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="give the path of a recipe"):
        load_recipe(tmp_path)
