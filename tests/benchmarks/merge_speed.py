"""What a merge costs: ours, mergekit-moe's and the floor, alternating in one run.

    python -m venv peer && peer/bin/pip install mergekit==0.1.5
    python tests/benchmarks/merge_speed.py --peer peer/bin/mergekit-moe

A random Llama of 334M parameters in bfloat16 and four fine-tunes of it (every weight changed) become one MoE of 1.9 GB.
The floor reads the tensors of the same bytes with safetensors and writes them again. `--scale 4` is a model of four
times the size. CPU seconds are user and system of the whole process; memory is the peak of what is not file pages
(RssAnon), looked at every 10 ms.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

EXPERTS = 4
_MAKE = """
import sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from mergekit_moe.seed import train_tokenizer
folder, hidden = Path(sys.argv[1]), int(sys.argv[2])
tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 3, 300)
torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig(vocab_size=32000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=16,
                     num_attention_heads=16, num_key_value_heads=16)
model = LlamaForCausalLM(config)
for number in range(-1, int(sys.argv[3])):
    torch.manual_seed(number + 1)
    for parameter in model.parameters() if number >= 0 else ():
        parameter.data.add_(1e-3 * torch.randn_like(parameter))
    name = "base" if number < 0 else f"expert{number}"
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
"""
_FLOOR = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
source, out = map(Path, sys.argv[1:])
out.mkdir()
for shard in sorted(source.glob("*.safetensors")):
    save_file(load_file(shard), out / shard.name)
"""


def measured(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return its CPU seconds, wall seconds, and peak of anonymous memory in GB."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        os.set_blocking(process.stdout.fileno(), False)  # type: ignore[union-attr]
        printed = b""
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            printed += process.stdout.read() or b""  # type: ignore[union-attr]
            if pid:
                break
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.01)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} failed:\n{printed.decode()[-3000:]}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - start, peak / 1e9


def _anonymous(pid: int) -> int:
    """Return a process's RssAnon in bytes; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def write_recipes(folder: Path) -> tuple[Path, Path]:
    """Return our recipe and the peer's, of the same merge."""
    names = [f"expert{number}" for number in range(EXPERTS)]
    ours: dict[str, Any] = {
        "base_model": "base",
        "experts": [{"name": name, "source": name} for name in names],
        "merge": {"top_k": 2},
        "router": {"start": "random", "context": "none"},
    }
    peer = {
        "base_model": str(folder / "base"),
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts_per_token": 2,
        "experts": [{"source_model": str(folder / name), "positive_prompts": [name]} for name in names],
    }
    for name, recipe in (("ours.yaml", ours), ("peer.yaml", peer)):
        (folder / name).write_text(yaml.safe_dump(recipe))
    return folder / "ours.yaml", folder / "peer.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="the mergekit-moe command, in an environment of its own")
    parser.add_argument("--folder", type=Path, default=Path("merge-speed"), help="for models; kept, and used again")
    parser.add_argument("--scale", type=int, default=1, choices=[1, 4], help="of the model")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute() / str(arguments.scale)
    if not (folder / f"expert{EXPERTS - 1}" / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        hidden = {1: 1024, 4: 2048}[arguments.scale]
        subprocess.run([sys.executable, "-c", _MAKE, str(folder), str(hidden), str(EXPERTS)], check=True)
    ours, peer = write_recipes(folder)
    out = folder / "out"
    methods = {
        "ours": [sys.executable, "-m", "mergekit_moe", "merge", str(ours), "--workspace", str(out / "ours")],
        "floor": [sys.executable, "-c", _FLOOR, str(folder / "reference"), str(out / "floor")],
    }
    if arguments.peer:
        methods["peer"] = [str(arguments.peer), str(peer), str(out / "peer")]
    if not (folder / "reference").is_dir():
        shutil.rmtree(out, ignore_errors=True)
        measured(methods["ours"])
        (out / "ours" / "merged").rename(folder / "reference")
    costs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in methods}
    for _ in range(arguments.repeats):
        for name, command in methods.items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            costs[name].append(measured(command))
    size = sum(file.stat().st_size for file in (folder / "reference").glob("*.safetensors"))
    print(f"output {size / 1e9:.2f} GB; medians of {arguments.repeats}")
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in costs.items()}
    for name, (cpu, wall, memory) in medians.items():
        print(f"{name:6} {cpu:6.1f} CPU s  {wall:6.1f} s  {memory:5.2f} GB")
    for other in [name for name in methods if name != "ours"]:
        ratios = [mine[0] / theirs[0] for mine, theirs in zip(costs["ours"], costs[other], strict=True)]
        print(f"ours over {other}: {statistics.median(ratios):.2f} x the CPU seconds")


if __name__ == "__main__":
    main()
