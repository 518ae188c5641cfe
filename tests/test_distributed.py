"""The same stage on two processes under `accelerate launch`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_pipeline import metamoe, tiny_recipe

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose experts and router were trained by two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    recipe = tiny_recipe(folder)
    for stage in ("select", "seed"):
        metamoe(stage, recipe, "--workspace", folder / "ws")
    for stage in ("align", "publish", "merge", "train-router"):
        command = [*LAUNCH, "-m", "mergekit_moe", stage, str(recipe), "--workspace", str(folder / "ws")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "ws"


def test_two_processes_leave_whole_folders_that_one_process_accepts(workspace: Path) -> None:
    again = metamoe("train-router", workspace.parent / "tiny.yaml", "--workspace", workspace)
    assert "building" not in again.stdout
    assert not list(workspace.rglob(".*"))


def test_two_processes_train_experts(workspace: Path) -> None:
    for name in ("cooking", "sailing", "algebra"):
        adapter = load_file(workspace / "experts" / name / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in adapter.values())


def test_two_processes_fit_the_closed_form_as_one_does(workspace: Path) -> None:
    """Statistics are summed over processes: the routers equal those of one process."""
    recipe = workspace.parent / "tiny.yaml"
    closed = recipe.with_name("closed.yaml")
    closed.write_text(
        recipe.read_text().replace("  training:\n    batch_size: 8\n    max_steps: 4\n", "  training: null\n")
    )
    assert "training: null" in closed.read_text()
    routers = []
    for launcher in ([sys.executable], LAUNCH):
        command = [*launcher, "-m", "mergekit_moe", "train-router", str(closed), "--workspace", str(workspace)]
        (workspace / "model" / "manifest.json").write_text(json.dumps({"inputs": {}, "outputs": {}}))
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        routers.append(load_file(workspace / "model" / "model-00003-of-00003.safetensors"))
    for name, tensor in routers[0].items():
        assert (tensor - routers[1][name]).abs().max() <= 1e-5 * max(1.0, float(tensor.abs().max())), name
