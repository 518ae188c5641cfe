"""Clients publish, a unifier finds, merges and pushes, a stranger loads: all of it through the loopback Hub."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import write_jsonl
from hub_tools import TOKEN, environment, hub_with_users, metamoe
from loopback_hub import Hub, serve
from test_pipeline import sentences, tiny_recipe

NAMES = ("cooking", "sailing", "algebra")


class World(NamedTuple):
    hub: Hub
    clients: Path
    """The clients' workspace."""
    unifier: Path
    """The unifier's folder, with its workspace `ws`."""
    found: dict[str, Any]
    """What `metamoe find --json` printed."""


def succeed(hub: Hub, home: Path, *arguments: object) -> str:
    done = metamoe(hub, home, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def publish(hub: Hub, folder: Path) -> Path:
    """What clients do: a base model from the Hub, private rows here, experts pushed; return their workspace."""
    recipe, workspace, home = tiny_recipe(folder), folder / "ws", folder / "home"
    values = yaml.safe_load(recipe.read_text())
    pool = (folder / "pool.jsonl").read_bytes()
    hub.add("org/pool", {"train.jsonl": pool, "README.md": b"---\nlicense: cc0-1.0\n---\n"}, kind="dataset")
    (folder / "pool.jsonl").unlink()
    values["public_pool"]["dataset"] = "org/pool"
    recipe.write_text(yaml.safe_dump(values))
    succeed(hub, home, "select", recipe, "--workspace", workspace)
    succeed(hub, home, "seed", recipe, "--workspace", workspace)
    succeed(hub, home, "push", workspace / "seed", "org/seed")
    values["base_model"] = "org/seed"
    for expert in values["experts"]:
        expert["license"] = "apache-2.0"
    recipe.write_text(yaml.safe_dump(values))
    for command in ("align", "publish"):
        succeed(hub, home, command, recipe, "--workspace", workspace)
    for name in NAMES:
        succeed(hub, home, "push", workspace / "experts" / name, f"org/{name}")
        succeed(hub, home, "push", workspace / "proxy-sets" / name, f"org/{name}-proxies")
    return workspace


def unify(hub: Hub, folder: Path) -> dict[str, Any]:
    """What a unifier does, knowing the base model's name alone; return what it found."""
    home = folder / "home"
    found = json.loads(succeed(hub, home, "find", "org/seed", "--json"))
    experts = []
    for expert in found["experts"]:
        if expert["problem"] is None:
            name = expert["source"].partition("/")[2]
            write_jsonl(folder / f"{name}.jsonl", sentences(name, 12, 3))
            test = {"dataset": f"{name}.jsonl", "text": "{text}"}
            experts.append({"name": name, "source": expert["source"], "revision": expert["sha"], "test": test})
    recipe = {
        "base_model": "org/seed",
        "revision": found["base_model"]["revision"],
        "public_pool": {"dataset": "org/pool", "text": "{text}", "tag": "kind"},
        "experts": experts,
        "router": {"training": {"max_steps": 4, "batch_size": 8}},
        "card": {"license": "apache-2.0"},
    }
    (folder / "unified.yaml").write_text(yaml.safe_dump(recipe))
    succeed(hub, home, "run", folder / "unified.yaml", "--workspace", folder / "ws")
    succeed(hub, home, "push", folder / "ws" / "model", "org/unified")
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Hub after the whole trip."""
    hub = hub_with_users()
    clients, unifier = tmp_path_factory.mktemp("clients"), tmp_path_factory.mktemp("unifier")
    with serve(hub):
        workspace = publish(hub, clients)
        hub.add("eve/prompts", {"adapter_config.json": b'{"peft_type": "PROMPT_TUNING"}', "README.md": _BASED})
        hub.add("eve/other", {"config.json": b'{"model_type": "gpt2"}', "README.md": _BASED})
        yield World(hub, workspace, unifier, unify(hub, unifier))


_BASED = b"---\nbase_model: org/seed\nlicense: mit\n---\n"

_STRANGER = """
import sys
sys.modules["mergekit_moe"] = None  # whatever this environment has installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
place = {"pretrained_model_name_or_path": sys.argv[1], "trust_remote_code": True}
model, tokenizer = AutoModelForCausalLM.from_pretrained(**place), AutoTokenizer.from_pretrained(**place)
prompts = ("simmer the onion", "hoist the mainsail and", "solve the equation for x")
for prompt in prompts:
    print(model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=16, do_sample=False).tolist())
"""


def generate(hub: Hub, home: Path, source: str, **others: str) -> list[str]:
    """Return what a stranger's process generates, with transformers alone."""
    variables = environment(hub, home, **others)
    variables.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", _STRANGER, source]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_stranger_loads_from_the_hub_what_the_unifier_has_in_a_folder(world: World, tmp_path: Path) -> None:
    from_hub = generate(world.hub, tmp_path, "org/unified")
    assert len(from_hub) == 3
    assert len(set(from_hub)) == 3
    assert from_hub == generate(world.hub, tmp_path, str(world.unifier / "ws" / "model"))


def test_every_expert_is_found_with_its_commit_and_what_does_not_fit_is_said(world: World) -> None:
    found = {expert["source"]: expert for expert in world.found["experts"]}
    assert set(found) == {*(f"org/{name}" for name in NAMES), "eve/prompts", "eve/other"}
    for name in NAMES:
        expert = found[f"org/{name}"]
        assert (expert["kind"], expert["license"], expert["proxies"]) == ("LoRA, rank 4", "apache-2.0", True)
        assert (expert["sha"], expert["relation"]) == (world.hub.model(f"org/{name}").head.sha, "adapter")
    assert found["eve/prompts"]["problem"].startswith("adapter_config.json says peft_type 'PROMPT_TUNING'")
    assert found["eve/other"]["problem"].startswith("its config.json differs from the base's: model_type 'gpt2'")


def test_the_card_and_the_report_name_every_commit(world: World) -> None:
    card = world.hub.model("org/unified").head.files["README.md"].decode()
    report = json.loads(world.hub.model("org/unified").head.files["merge.json"])
    assert report["base_model"] == {"source": "org/seed", "revision": world.hub.model("org/seed").head.sha}
    for expert in report["experts"]:
        assert expert["revision"] == world.hub.model(expert["source"]).head.sha
        assert expert["revision"][:7] in card


def test_each_source_is_one_commit_for_all_its_files(world: World) -> None:
    """No file is ever asked for at a branch, so that one that moves changes nothing in the middle."""
    resolved = [line for line in world.hub.log if "/resolve/" in line and "org/unified" not in line]
    assert resolved
    assert not [line for line in resolved if "/resolve/main/" in line]


def test_peft_loads_an_expert_from_the_hub(world: World, tmp_path: Path) -> None:
    script = (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('org/seed'), 'org/cooking')\n"
        "print(sum('lora_B' in name for name, _ in model.named_parameters()))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(world.hub, tmp_path))
    assert done.stdout.strip() == "6", done.stderr


def test_everything_pushed_is_private_and_carries_no_token_no_private_row_and_no_path(world: World) -> None:
    secrets = [TOKEN.encode(), str(world.clients.parent).encode(), str(world.unifier).encode()]
    secrets += [row["text"].encode() for name in NAMES for row in sentences(name, 60, 1)]
    pushed = [world.hub.model(f"org/{name}") for name in (*NAMES, "seed", "unified")]
    pushed += [world.hub.repositories["dataset", f"org/{name}-proxies"] for name in NAMES]
    for repository in pushed:
        assert repository.private
        assert len(repository.commits) == 2, "the Hub's own first one, and ours"
        for path, content in repository.head.files.items():
            assert not [secret for secret in secrets if secret in content], path
    kept = [path for folder in (world.clients.parent, world.unifier) for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in kept if TOKEN.encode() in path.read_bytes()]


def test_a_second_run_offline_works_from_the_cache_and_says_so(world: World) -> None:
    before = len(world.hub.log)
    offline = metamoe(
        *(world.hub, world.unifier / "home", "run", world.unifier / "unified.yaml"),
        *("--workspace", world.unifier / "ws"),
        HF_HUB_OFFLINE="1",
    )
    assert offline.returncode == 0, offline.stderr
    sha = world.hub.model("org/seed").head.sha
    assert f"note: base_model: org/seed is taken from the cache at {sha[:7]}, since HF_HUB_OFFLINE is set" in (
        offline.stdout
    )
    assert "building" not in offline.stdout
    assert len(world.hub.log) == before, "nobody was asked"
