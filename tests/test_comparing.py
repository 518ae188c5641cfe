"""`metamoe compare` from end to end on made-up text, and what it refuses."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from test_pipeline import metamoe, tiny_recipe, write_jsonl

from mergekit_moe.methods import METHODS, methods_of
from mergekit_moe.recipe_file import change_recipe, load_recipe

EXPERTS = ("cooking", "sailing", "algebra")
DENSE = ("soup", "task-arithmetic", "ties")
VOTES = ("btm", "btm-posterior")
TRAINED = ("btx", "flexolmo", "metamoe")
RUN = ("seed", *(f"expert-{name}" for name in EXPERTS), *DENSE, *VOTES, *TRAINED, "ours", "ours-top-2", "unrestricted")
ABLATIONS = {
    "top-k": {"selection": {"method": "top-k"}},
    "no-alignment": {"alignment": {"proxies": False}},
    "prompt": {"router": {"context": "prompt"}, "experts": {"algebra": {"client": {"test": {}}}}},
}


def recipe_with(folder: Path, **comparison: object) -> Path:
    path = tiny_recipe(folder)
    recipe = yaml.safe_load(path.read_text())
    write_jsonl(folder / "nobody.jsonl", [{"id": str(i), "text": f"nobody knows {i} of this"} for i in range(12)])
    strangers = {"nobody": {"dataset": "nobody.jsonl", "text": "{text}"}}
    recipe["comparison"] = {"seeds": [0, 1], "strangers": strangers} | comparison
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("compared")
    ABLATIONS["prompt"]["experts"] = {
        "algebra": {"client": {"test": {"dataset": "algebra.jsonl", "prompt": "a", "completion": "{text}"}}}
    }
    recipe = recipe_with(folder, ablations=ABLATIONS)
    only = ",".join([*RUN, *(f"ablation-{name}" for name in ABLATIONS)])
    return folder, metamoe("compare", recipe, "--workspace", folder / "ws", "--only", only)


def comparison_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "ws/comparison/comparison.json").read_text())


def test_all_methods_on_all_domains_over_the_seeds(compared: tuple[Path, object]) -> None:
    found = comparison_of(compared[0])
    assert found["seeds"] == [0, 1] and found["domains"] == list(EXPERTS)
    assert set(found["methods"]) == {*RUN, "oracle", *(f"ablation-{name}" for name in ABLATIONS)}
    for name, method in found["methods"].items():
        assert set(method["seeds"]) == {"0", "1"}, name
        for result in method["seeds"].values():
            assert set(result["domains"]) == set(EXPERTS)
    for seed in "01":
        own = found["methods"]["oracle"]["seeds"][seed]
        assert own["retention"]["by_domain"] == dict.fromkeys(EXPERTS, pytest.approx(1.0))
        ours = found["methods"]["ours"]["seeds"][seed]
        assert set(ours["routing"]) == set(EXPERTS) and set(ours["strangers"]) == {"nobody"}
        assert ours["trainable_parameters"] == 2 * (3 * 32 + 3 + 1)
        assert ours["seconds"].keys() == {"merge", "router"}


def test_each_random_seed_is_another_run_from_the_same_seed_model(compared: tuple[Path, object]) -> None:
    methods = comparison_of(compared[0])["methods"]
    first, second = (methods["seed"]["seeds"][s]["domains"] for s in "01")
    assert {d: one["loss"] for d, one in first.items()} == {d: one["loss"] for d, one in second.items()}
    first, second = (methods["expert-algebra"]["seeds"][s]["domains"]["algebra"]["loss"] for s in "01")
    assert first != second


def test_only_an_ablation_of_alignment_trains_experts_anew(compared: tuple[Path, object]) -> None:
    variants = compared[0] / "ws/seeds/0/variants"
    assert (variants / "no-alignment/experts/algebra").is_dir()
    assert (variants / "top-k/proxies/algebra").is_dir()
    assert not (variants / "top-k/aligned").exists()


def test_other_held_out_rows_bring_their_own_references(compared: tuple[Path, object]) -> None:
    prompt = comparison_of(compared[0])["methods"]["ablation-prompt"]["seeds"]["0"]
    assert set(prompt["references"]) == {"seed", *(f"expert-{name}" for name in EXPERTS)}
    whole = comparison_of(compared[0])["methods"]["seed"]["seeds"]["0"]["domains"]
    assert prompt["references"]["seed"]["algebra"]["loss"] != whole["algebra"]["loss"]
    assert prompt["references"]["seed"]["cooking"]["loss"] == whole["cooking"]["loss"]


def test_tables_and_pictures_lie_beside_it_and_no_model_is_left(compared: tuple[Path, object]) -> None:
    out = compared[0] / "ws/comparison"
    assert "| **ours** |" in (out / "comparison.md").read_text()
    assert len(list(out.glob("*.png"))) == 3
    assert not list((compared[0] / "ws/seeds/0/methods").rglob("*.safetensors"))


def test_results_of_an_older_recipe_are_left_out_and_told(compared: tuple[Path, object], tmp_path: Path) -> None:
    folder = compared[0]
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    recipe["merge"] = recipe.get("merge", {}) | {"top_k": 2}
    (folder / "changed.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copytree(folder / "ws", tmp_path / "ws")
    done = metamoe("compare", folder / "changed.yaml", "--workspace", tmp_path / "ws", "--only", "oracle")
    assert "ours, random seed 0: of an older recipe, left out" in done.stdout
    left = json.loads((tmp_path / "ws/comparison/comparison.json").read_text())["methods"]
    assert {"seed", "soup", "btm"} < set(left) and "ours" not in left


def test_no_result_of_older_experts_stands_beside_one_of_new_ones(
    compared: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    recipe = yaml.safe_load((compared[0] / "tiny.yaml").read_text())
    recipe["alignment"]["max_steps"] += 1
    (compared[0] / "longer.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copytree(compared[0] / "ws", tmp_path / "ws")
    only = ["--only", "ours", "--seeds", "0"]
    done = metamoe("compare", compared[0] / "longer.yaml", "--workspace", tmp_path / "ws", *only)
    assert "soup, random seed 0: of an older recipe, left out" in done.stdout
    assert "ours, random seed 1: of an older recipe, left out" in done.stdout
    methods = json.loads((tmp_path / "ws/comparison/comparison.json").read_text())["methods"]
    assert {name: set(method["seeds"]) for name, method in methods.items()} == {"ours": {"0"}}


@pytest.fixture(scope="module")
def published(
    compared: tuple[Path, subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A recipe of experts that were published elsewhere."""
    made, folder = yaml.safe_load((compared[0] / "tiny.yaml").read_text()), tmp_path_factory.mktemp("published")
    workspace = compared[0] / "ws"
    recipe = {key: made[key] for key in ("public_pool", "selection", "router")}
    recipe |= {"base_model": str(workspace / "seed"), "data_dir": str(compared[0]), "comparison": {"seeds": [0]}}
    recipe["experts"] = [
        {
            "name": name,
            "source": str(workspace / f"seeds/0/experts/{name}"),
            "test": {"dataset": f"{name}.jsonl", "text": "{text}", "limit": 6},
        }
        for name in EXPERTS
    ]
    (folder / "published.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "published.yaml"


def test_experts_that_were_published_elsewhere_are_compared_by_the_proxies_that_they_brought(
    published: Path, tmp_path: Path
) -> None:
    only = ("seed", *(f"expert-{name}" for name in EXPERTS), "flexolmo", "ours")
    metamoe("compare", published, "--workspace", tmp_path / "ws", "--only", ",".join(only))
    methods = json.loads((tmp_path / "ws/comparison/comparison.json").read_text())["methods"]
    assert set(methods) == {*only, "oracle"}
    assert methods["flexolmo"]["seeds"]["0"]["retention"]["mean"] is not None


def test_proxies_of_another_pool_and_a_selection_by_nobody_are_refused(published: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(published.read_text())
    write_jsonl(tmp_path / "other.jsonl", [{"text": f"row {i} of another pool"} for i in range(40)])
    other = recipe | {"public_pool": {"dataset": str(tmp_path / "other.jsonl"), "text": "{text}"}}
    ablated = recipe | {"comparison": {"ablations": {"few": {"selection": {"budget": 9}}}}}
    for changed, sentence in (
        (other, "expert 'cooking': its proxies were picked from another pool"),
        (ablated, "ablations.few.selection: all experts brought their proxies, and nobody selects any"),
    ):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(changed))
        done = metamoe("compare", tmp_path / "r.yaml", "--workspace", tmp_path / "ws", "--only", "ours", check=False)
        assert done.returncode == 2 and sentence in " ".join(done.stderr.split()), done.stderr
        assert not list((tmp_path / "ws").rglob("result.json"))


def test_what_ran_is_not_run_again(compared: tuple[Path, object]) -> None:
    folder = compared[0]
    again = metamoe("compare", folder / "tiny.yaml", "--workspace", folder / "ws", "--only", "ours,soup")
    assert "building" not in again.stdout
    assert set(comparison_of(folder)["methods"]) >= {"btm", "ours"}


def test_the_oracle_alone_makes_the_experts_and_an_empty_table(
    compared: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    shutil.copytree(compared[0] / "ws", tmp_path / "ws", ignore=shutil.ignore_patterns("methods", "comparison"))
    done = metamoe("compare", compared[0] / "tiny.yaml", "--workspace", tmp_path / "ws", "--only", "oracle")
    assert "comparison.md" in done.stdout
    assert json.loads((tmp_path / "ws/comparison/comparison.json").read_text())["methods"] == {}


@pytest.mark.parametrize(
    ("comparison", "arguments", "sentence"),
    [
        ({}, ["--only", "magic"], "there is no method 'magic' to compare; there are seed, expert-cooking"),
        ({}, ["--seeds", "one"], "--seeds: 'one' is no number"),
        (
            {"ablations": {"x": {"rooter": {}}}},
            [],
            "comparison.ablations.x: unknown key 'rooter'; did you mean 'router'?",
        ),
        ({"ablations": {"x": {"experts": {"law": {}}}}}, [], "ablations.x.experts: there is no expert 'law'"),
        (
            {"ablations": {"x": {"seed": 3}}},
            [],
            "comparison.ablations.x.seed: all methods share it; an ablation changes",
        ),
        ({"seeds": [-1]}, [], "comparison.seeds.0"),
        ({}, ["--seeds", "²"], "--seeds: '²' is no number"),
    ],
)
def test_bad_comparisons_are_refused_before_any_work(
    comparison: dict[str, object], arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    recipe = recipe_with(tmp_path, **comparison)
    done = metamoe("compare", recipe, "--workspace", tmp_path / "ws", *arguments, check=False)
    assert done.returncode == 2 and sentence in " ".join(done.stderr.split())
    assert not (tmp_path / "ws").exists()


def test_every_method_says_what_it_is() -> None:
    assert {method.group for method in METHODS.values()} == {"reference", "baseline", "ours", "ceiling"}
    assert [name for name, method in METHODS.items() if method.private] == ["unrestricted"]


@pytest.mark.parametrize(
    ("top_k", "beside"), [(1, {"ours-top-2"}), (2, {"ours-top-1"}), (3, {"ours-top-1", "ours-top-2"})]
)
def test_how_many_experts_a_token_is_a_row_unless_the_recipe_is_that(
    top_k: int, beside: set[str], tmp_path: Path
) -> None:
    recipe = change_recipe(load_recipe(tiny_recipe(tmp_path)), {"merge": {"top_k": top_k}}, "test")
    assert {name for name in methods_of(recipe) if name.startswith("ours-")} == beside


def test_what_is_no_comparison_is_refused_before_any_work(tmp_path: Path) -> None:
    path = tiny_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    names = [expert["name"] for expert in recipe["experts"]]
    for change, sentence in (
        ({"merge": {"method": "soup"}}, "merge.method soup: compare has a row for it already"),
        ({"experts": [{"name": name, "source": name} for name in names]}, "no expert has held-out rows"),
        (
            {
                "base_model": "org/seed",
                "experts": [*recipe["experts"][:2], {"name": "law", "source": "law", "proxies": "expert-gain"}],
            },
            "expert 'law': compare unifies what experts published",
        ),
    ):
        kept = recipe if "merge" not in change else {key: recipe[key] for key in recipe.keys() - {"router", "export"}}
        path.write_text(yaml.safe_dump(kept | change))
        done = metamoe("compare", path, "--workspace", tmp_path / "ws", check=False)
        assert done.returncode == 2 and sentence in " ".join(done.stderr.split()), done.stderr
        assert not (tmp_path / "ws").exists()


def test_no_setting_of_the_recipe_s_training_is_a_baseline_s(tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path))
    own = {
        "gradient_accumulation": 4,
        "optimizer": "sgd",
        "momentum": 0.9,
        "max_steps": 7,
        "patience": 1,
        "z_weight": 1.0,
    }
    strange = change_recipe(recipe, {"router": {"training": own}}, "test")
    for name in ("btx", "flexolmo", "metamoe"):
        plain, leaked = (
            change_recipe(r, methods_of(r)[name].changes or {}, name).router.training for r in (recipe, strange)
        )
        assert plain == leaked and plain is not None, name
    published = change_recipe(strange, METHODS["metamoe"].changes or {}, "test").router
    assert (published.training.learning_rate, published.training.epochs) == (1e-4, 1)
    assert published.training.batch_size * published.training.gradient_accumulation == 32
    assert published.training.trains == "router+experts" and published.start == "means"


def test_private_rows_are_a_row_only_where_all_are_here(tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path))
    assert "unrestricted" in methods_of(recipe)
    elsewhere = recipe.model_copy(update={"experts": [recipe.experts[0].model_copy(update={"client": None})]})
    assert "unrestricted" not in methods_of(elsewhere)
