"""The same stages on two processes that `accelerate launch` starts.

`--multi_gpu` has it start as many as asked for, on a machine without any device, too; with `--cpu` it starts one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_pipeline import metamoe, tiny_recipe

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]

_WORKER = """
import os, pathlib, sys
from mergekit_moe.cli import main
seen = pathlib.Path(sys.argv.pop())
try:
    main()
except SystemExit as leaving:
    assert not leaving.code, leaving.code
(seen / f"{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}").touch()
"""


def two_processes(folder: Path, *arguments: object) -> None:
    """Run the command line in two processes that know of each other."""
    shutil.rmtree(folder / "seen", ignore_errors=True)
    (folder / "seen").mkdir()
    (folder / "worker.py").write_text(_WORKER)
    command = [*LAUNCH, str(folder / "worker.py"), *map(str, arguments), str(folder / "seen")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in (folder / "seen").iterdir()} == {"0-of-2", "1-of-2"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stages were all made by two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    two_processes(folder, "run", tiny_recipe(folder), "--workspace", folder / "ws")
    return folder / "ws"


def test_two_processes_leave_whole_folders_that_one_process_accepts(workspace: Path) -> None:
    again = metamoe("run", workspace.parent / "tiny.yaml", "--workspace", workspace)
    assert "building" not in again.stdout
    assert not list(workspace.rglob(".*"))


def test_accelerate_launch_starts_a_stage(workspace: Path, tmp_path: Path) -> None:
    copy = tmp_path / "ws"
    shutil.copytree(workspace, copy)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    (copy / "aligned" / "cooking" / "manifest.json").write_text(json.dumps({"inputs": {}, "outputs": {}}))
    stage = ["-m", "mergekit_moe", "align", str(workspace.parent / "tiny.yaml"), "--workspace", str(copy)]
    done = subprocess.run([*launcher, *stage], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "aligned/cooking: building" in done.stdout
    assert "aligned/sailing: up to date" in done.stdout


def test_two_processes_share_the_work_of_training(workspace: Path) -> None:
    """Twelve steps of eight rows on each of two processes are more epochs than on one."""
    alone = 12 * 8 / (54 + 20)
    log = json.loads((workspace / "aligned" / "cooking" / "training_log.json").read_text())
    assert log[-1]["step"] == 12
    assert log[-1]["epoch"] > 1.5 * alone


def test_two_processes_fit_the_closed_form_as_one_does(workspace: Path) -> None:
    """Each expert's statistics are summed over processes: the routers equal those of one process."""
    recipe = workspace.parent / "tiny.yaml"
    trained = "  training:\n    batch_size: 8\n    max_steps: 4\n"
    assert trained in recipe.read_text()
    closed = recipe.parent / "closed" / recipe.name  # the same name: it is part of what is published
    closed.parent.mkdir()
    closed.write_text(recipe.read_text().replace(trained, "  training: null\n"))
    routers = []
    for launch in (metamoe, lambda *arguments: two_processes(workspace.parent, *arguments)):
        shutil.rmtree(workspace / "routing")
        (workspace / "model" / "manifest.json").write_text(json.dumps({"inputs": {}, "outputs": {}}))
        launch("train-router", closed, "--workspace", workspace, "--data-dir", recipe.parent)
        routers.append(load_file(workspace / "model" / "model-00003-of-00003.safetensors"))
    for name, tensor in routers[0].items():
        assert (tensor - routers[1][name]).abs().max() <= 1e-5 * max(1.0, float(tensor.abs().max())), name


_TRAINER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
sys.path[:0] = sys.argv[2:]
from conftest import tiny_moe
from test_training import proxies
from mergekit_moe.router_recipe import RouterTraining
from mergekit_moe.routing.training import train_routers
from mergekit_moe.workspace import is_main_process, leave_processes, process_state
out, processes = Path(sys.argv[1]), process_state().num_processes
model, rows = tiny_moe("Llama"), proxies()
rows = rows.map(lambda row, i: {n: row[n][: 3 + i % 10] for n in ("input_ids", "labels")}, with_indices=True)
settings = RouterTraining(
    trains="router+experts", batch_size=8 // processes, max_steps=5, learning_rate=1e-3,
    domain_weight=0.7, balance_weight=0.3, z_weight=0.1, patience=20,
)
log = train_routers(model, rows, settings, seed=3, folder=out / f"of-{processes}", judges=rows)
if is_main_process():
    losses = torch.tensor([entry["loss"] for entry in log if "loss" in entry])
    save_file({**model.state_dict(), "losses": losses}, out / f"{processes}.safetensors")
leave_processes()
"""


def test_two_processes_train_routers_and_experts_as_one_does(tmp_path: Path) -> None:
    """The same rows a step, of very different length and of experts that one process may have none of; every loss."""
    (tmp_path / "trainer.py").write_text(_TRAINER)
    places = [str(tmp_path), str(Path(__file__).parent), str(Path(__file__).parent / "routing")]
    for launch in ([sys.executable], LAUNCH):
        done = subprocess.run([*launch, str(tmp_path / "trainer.py"), *places], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, shared = (load_file(tmp_path / f"{processes}.safetensors") for processes in (1, 2))
    for name, tensor in alone.items():
        assert (tensor - shared[name]).abs().max() <= 1e-5 * max(1.0, float(tensor.abs().max())), name


def test_two_processes_select_as_one_does(workspace: Path, tmp_path: Path) -> None:
    """Embeddings and picks: bytes of the one, rows of the other."""
    metamoe("select", workspace.parent / "tiny.yaml", "--workspace", tmp_path / "alone")
    for file in ("embeddings/embeddings.npy", "embeddings/first_occurrence.npy"):
        assert (workspace / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    for client in ("cooking", "sailing"):
        ours, alone = (
            json.loads((folder / "proxies" / client / "proxies.json").read_text())
            for folder in (workspace, tmp_path / "alone")
        )
        assert ours == alone


_PICKER = """
import sys, numpy as np
from mergekit_moe.selection.dpp import greedy_map
from mergekit_moe.selection.processes import Processes
from mergekit_moe.workspace import leave_processes
processes = Processes.of_launch()
assert processes.world_size == 2
for seed in range(int(sys.argv[1]), int(sys.argv[1]) + 12):
    rng = np.random.default_rng(seed)
    n, size = int(rng.integers(3, 3000)), int(rng.integers(2, 40))
    rows = rng.normal(size=(n, size))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    relevance, allowed = rng.uniform(0.01, 1.0, n), rng.uniform(size=n) < 0.8
    budget = int(rng.integers(1, max(1, min(allowed.sum(), 3 * size)) + 1))
    settings = {"alpha": float(rng.choice([1.0, 4.0])), "epsilon": float(rng.choice([0.0, 0.1]))}
    share = processes.share(n)
    split = greedy_map(rows[share], relevance[share], budget, allowed=allowed[share], processes=processes, **settings)
    whole = greedy_map(rows, relevance, budget, allowed=allowed, **settings)
    assert split.rows.tolist() == whole.rows.tolist(), (seed, n, size, budget, settings)
    assert allowed[split.rows].all() and np.allclose(split.gains, whole.gains)
leave_processes()
"""


def test_two_processes_pick_what_one_picks_on_fresh_random_problems(tmp_path: Path) -> None:
    (tmp_path / "picker.py").write_text(_PICKER)
    seed = int.from_bytes(os.urandom(3))
    done = subprocess.run([*LAUNCH, str(tmp_path / "picker.py"), str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
