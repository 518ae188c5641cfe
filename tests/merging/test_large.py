"""A merge's own memory doesn't grow with the model; one that is killed leaves the old state or the whole new one.

The models are files of zeros with holes for data: gigabytes to whoever reads them, and next to nothing on a disk.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_moe.checkpoint import WEIGHTS, read_header, shards_of
from mergekit_moe.workspace import MANIFEST, file_sha256


def hollow_model(folder: Path, **sizes: int) -> int:
    """Write a bfloat16 Llama whose weights are a hole; return its size in bytes."""
    folder.mkdir()
    config = LlamaConfig(vocab_size=1000, num_attention_heads=8, num_key_value_heads=8, dtype="bfloat16", **sizes)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    header: dict[str, Any] = {}
    end = 0
    for name, parameter in model.named_parameters():
        places = [end, end + 2 * parameter.numel()]
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": places}
        end = places[1]
    text = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def hollow_recipe(folder: Path, experts: int, **sizes: int) -> tuple[Path, int]:
    """Write a base, fine-tunes and their recipe; return it and the size of the merged FFNs in bytes."""
    size = 0
    for name in ("base", *(f"e{i}" for i in range(experts))):
        size += hollow_model(folder / name, **sizes)
    recipe = {
        "base_model": "base",
        "experts": [{"name": f"e{i}", "source": f"e{i}"} for i in range(experts)],
        "router": {"start": "random"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml", size


_LIMITED = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.argv = ["metamoe", "merge", sys.argv[2], "--workspace", sys.argv[3]]
from mergekit_moe.cli import main
main()
"""


def merge_within(limit: int, recipe: Path, workspace: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _LIMITED, str(limit), str(recipe), str(workspace)]
    # glibc's and torch's own reserves count by thread, whatever is merged.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_merge_needs_a_third_of_its_output_at_most_and_no_more_for_more_layers(tmp_path: Path) -> None:
    """RLIMIT_DATA: all memory that is private and writable, used or only reserved."""
    recipe, _ = hollow_recipe(tmp_path, 4, hidden_size=1024, intermediate_size=4096, num_hidden_layers=10)
    done = merge_within(350_000_000, recipe, tmp_path / "ws")
    assert done.returncode == 0, done.stderr[-2000:]
    written = sum(file.stat().st_size for file in (tmp_path / "ws" / "merged").glob("*.safetensors"))
    assert written > 3 * 350_000_000
    for shard in shards_of(tmp_path / "ws" / "merged", "merged"):
        with safe_open(tmp_path / "ws" / "merged" / shard, framework="pt") as file:
            assert set(file.keys()) == set(read_header(tmp_path / "ws" / "merged" / shard, "merged"))


def state(merged: Path) -> str | None:
    """Return what a folder is: its experts' number by its config, after every byte was checked; None without one."""
    if not merged.exists():
        return None
    manifest = json.loads((merged / MANIFEST).read_text())
    files = {path.name for path in merged.iterdir()} - {MANIFEST}
    assert files == manifest["outputs"].keys()
    for name, facts in manifest["outputs"].items():
        assert file_sha256(merged / name) == facts["sha256"], name
    return str(len(json.loads((merged / "config.json").read_text())["experts"]))


def test_ten_kills_leave_the_old_state_or_the_whole_new_one(tmp_path: Path) -> None:
    recipe, _ = hollow_recipe(tmp_path, 3, hidden_size=256, intermediate_size=2048, num_hidden_layers=8)
    values = yaml.safe_load(recipe.read_text())
    two = tmp_path / "two.yaml"
    two.write_text(yaml.safe_dump({**values, "experts": values["experts"][:2]}))
    workspace = tmp_path / "ws"
    command = [sys.executable, "-m", "mergekit_moe", "merge", "--workspace", str(workspace)]
    start = time.monotonic()
    subprocess.run([*command, str(two)], check=True, capture_output=True)
    whole = time.monotonic() - start
    rng = random.Random(0)
    seen: list[str | None] = []
    current = "2"
    for attempt in range(10):
        wanted = recipe if current == "2" else two
        process = subprocess.Popen([*command, str(wanted)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        partial = workspace / ".merged.partial"
        if attempt % 2:  # every other time while it surely writes
            while process.poll() is None and not partial.exists():
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.3 * whole))
        else:
            time.sleep(rng.uniform(0.3 * whole, whole))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = state(workspace / "merged")
        assert found in ("2", "3")
        seen.append(found)
        current = found or "2"
    assert len(seen) == 10
    done = subprocess.run([*command, str(recipe)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert state(workspace / "merged") == "3"
    assert [path.name for path in workspace.iterdir()] == ["merged"], "nothing temporary is left"


def test_half_a_replacement_is_undone(tmp_path: Path) -> None:
    """Between its two renames a kill leaves no folder, and the old one under its temporary name."""
    recipe, _ = hollow_recipe(tmp_path, 2, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    command = [sys.executable, "-m", "mergekit_moe", "merge", str(recipe), "--workspace", str(tmp_path / "ws")]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "ws" / "merged").rename(tmp_path / "ws" / ".merged.old")
    done = subprocess.run(command, capture_output=True, text=True)
    assert "merged: up to date" in done.stdout
    assert state(tmp_path / "ws" / "merged") == "2"


_BASELINE = """
import mergekit_moe.pipeline, mergekit_moe.merging.unify
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmData")]
print(line.split()[1])
"""


@pytest.mark.parametrize("layers", [2, 8])
def test_memory_of_a_merge_does_not_grow_with_the_number_of_layers(tmp_path: Path, layers: int) -> None:
    """Both pass the same limit: 64 MB above what Python and torch hold once they are imported."""
    recipe, size = hollow_recipe(tmp_path, 2, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    baseline = subprocess.run([sys.executable, "-c", _BASELINE], capture_output=True, text=True, env=environment)
    done = merge_within(1024 * int(baseline.stdout) + 64_000_000, recipe, tmp_path / "ws")
    assert done.returncode == 0, done.stderr[-2000:]
    assert size > 64_000_000 * layers
