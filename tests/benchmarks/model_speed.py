"""Speed and memory of the model class beside its dense base and the published way of running experts.

    python tests/benchmarks/model_speed.py [--hidden 512 1024] [--pairs 9] [--dtype float32] [--device cpu]

Every figure is the median of ratios of neighbouring runs in one process, the order turned each time.
Not part of the test suite: it says how fast, never whether right.
"""

import argparse
import copy
import functools
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from mergekit_moe.modeling import config_class, model_class

EXPERTS, RANK, MANY = 4, 16, 64
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PREFILL, PROMPT, DECODED = 1024, 64, 48


def shape(hidden: int) -> dict[str, int]:
    """Return a Llama's shape; the FFN as wide as Llama's is for that hidden size."""
    return {
        "vocab_size": 8192,
        "hidden_size": hidden,
        "intermediate_size": -(-hidden * 8 // 3 // 64) * 64,
        "num_hidden_layers": 4,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
    }


def ours(hidden: int, ranks: tuple[int, ...] = (RANK,) * EXPERTS) -> PreTrainedModel:
    """Return our model with random routers, so that every expert has work."""
    experts = [{"name": f"e{i}", "scale": 2.0, "ranks": dict.fromkeys(PROJECTIONS, r)} for i, r in enumerate(ranks)]
    model = model_class("Llama", "ForCausalLM")(config_class("Llama")(**shape(hidden), experts=experts))
    randomise(model)
    return model.eval()


def randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".router.weight" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)


class PublishedFeedForward(nn.Module):
    """The FFN as the paper's code runs it: expert by expert, each a whole FFN with its LoRA beside it.

    Expert 0 runs once more on every token, for the sake of a shape.
    """

    def __init__(self, base: nn.Module, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.base = base
        sizes = {"gate_proj": (hidden, intermediate), "up_proj": (hidden, intermediate)}
        sizes["down_proj"] = (intermediate, hidden)
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {n: nn.Sequential(nn.Linear(i, RANK, False), nn.Linear(RANK, o, False)) for n, (i, o) in sizes.items()}
            )
            for _ in range(EXPERTS)
        )
        self.gate = nn.Linear(hidden, EXPERTS, bias=False)

    def expert(self, number: int, hidden: Tensor) -> Tensor:
        factors = self.experts[number]

        def project(name: str, x: Tensor) -> Tensor:
            return self.base.get_submodule(name)(x) + 2.0 * factors[name](x)

        return project("down_proj", self.base.act_fn(project("gate_proj", hidden)) * project("up_proj", hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        output = torch.zeros_like(self.expert(0, hidden))
        weights, chosen = self.gate(hidden).softmax(-1).topk(1)
        for number in range(EXPERTS):
            mine = chosen[..., 0] == number
            if mine.any():
                output[mine] += weights[mine] * self.expert(number, hidden[mine])
        return output


def published(dense: LlamaForCausalLM) -> LlamaForCausalLM:
    model = copy.deepcopy(dense)
    for layer in model.model.layers:
        layer.mlp = PublishedFeedForward(layer.mlp, model.config.hidden_size, model.config.intermediate_size)
    return model.eval()


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Tensor) -> None:
    model(ids, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def decode(model: PreTrainedModel, ids: Tensor) -> float:
    """Return the seconds that DECODED tokens take after a prompt."""
    output = model(ids[:, :PROMPT], use_cache=True, logits_to_keep=1)
    synchronise(ids)
    start = time.perf_counter()
    for _ in range(DECODED):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    synchronise(ids)
    return time.perf_counter() - start


def synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def seconds(work: Callable[[], float | None], like: Tensor) -> float:
    synchronise(like)
    start = time.perf_counter()
    inner = work()
    synchronise(like)
    return time.perf_counter() - start if inner is None else inner


def speed(
    ours: Callable[[], float | None], other: Callable[[], float | None], pairs: int, like: Tensor
) -> tuple[float, float]:
    """Return the median, over pairs, of other's seconds over ours, and half the interquartile range."""
    ratios = []
    for pair in range(pairs + 1):
        times = {}
        for which in (ours, other) if pair % 2 else (other, ours):
            times[which] = seconds(which, like)
        if pair:  # the first one warms up
            ratios.append(times[other] / times[ours])
    quartiles = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), (quartiles[2] - quartiles[0]) / 2


def memory() -> None:
    """Print peak memory of loading and one pass, dense and ours, each in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        dense, moe = LlamaForCausalLM(LlamaConfig(**shape(1024))), ours(1024, (RANK,) * MANY)
        adapters = sum(p.nbytes for n, p in moe.named_parameters() if "lora_" in n or ".router." in n)
        base = sum(p.nbytes for p in dense.parameters())
        peaks = {}
        for name, model in (("dense", dense), ("ours", moe)):
            model.save_pretrained(Path(folder) / name)
            command = [sys.executable, __file__, "--load", str(Path(folder) / name)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            peaks[name] = [int(figure) for figure in printed[-2:]]
        print(
            f"peak memory, {MANY} experts, loading and one pass: base {base >> 20} MiB, adapters {adapters >> 20} MiB"
        )
        for figure, what in enumerate(("of its own", "and pages of the checkpoint, which the system takes back")):
            above = peaks["ours"][figure] - peaks["dense"][figure]
            print(f"  ours over dense, {what}: {above >> 20} MiB, {above / adapters:.2f} x the adapters")


def load(folder: str) -> None:
    """Print the peak bytes of loading a model and running it once: anonymous ones, and all that are resident."""
    from transformers import AutoModelForCausalLM

    peaks, done = [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            lines = Path("/proc/self/status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines)
            for i, field in enumerate(("RssAnon", "VmHWM")):
                peaks[i] = max(peaks[i], int(status[field].split()[0]) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with torch.no_grad():
        AutoModelForCausalLM.from_pretrained(folder)(torch.arange(64).unsqueeze(0))
    done.set()
    watcher.join()
    print(*peaks)


def factored(hidden: int, options: argparse.Namespace) -> None:
    """Print the speed of factored experts over the dense base's and over the published way's."""
    dense = LlamaForCausalLM(LlamaConfig(**shape(hidden))).eval()
    moe, dense, paper = placed([ours(hidden), dense, published(dense)], options)
    ids = torch.randint(0, 8192, (1, PREFILL), device=options.device)

    def twice(work: Callable[..., float | None]) -> float | None:
        first, second = work(paper, ids), work(paper, ids)
        return None if first is None or second is None else first + second

    run = functools.partial
    for name, work in (("prefill", prefill), ("decode", decode)):
        ratio, spread = speed(run(work, moe, ids), run(work, dense, ids), options.pairs, ids)
        over_paper, _ = speed(run(work, moe, ids), run(twice, work), max(3, options.pairs // 2), ids)
        print(f"hidden {hidden} {name}: {ratio:.2f} x dense (± {spread:.2f}), {over_paper:.1f} x published", flush=True)


def against_mixtral(hidden: int, options: argparse.Namespace) -> None:
    """Print the speed of dense experts, top-2, over stock Mixtral's of the same shape, with context and without."""
    experts = [{"name": f"e{i}", "kind": "dense"} for i in range(EXPERTS)]
    stock = MixtralForCausalLM(MixtralConfig(**shape(hidden), num_local_experts=EXPERTS, num_experts_per_tok=2)).eval()
    ids = torch.randint(0, 8192, (1, PREFILL), device=options.device)
    run = functools.partial
    for context in ("none", "prefix"):
        config = config_class("Llama")(**shape(hidden), experts=experts, num_experts_per_tok=2, router_context=context)
        moe = model_class("Llama", "ForCausalLM")(config).eval()
        randomise(moe)
        moe, stock = placed([moe, stock], options)
        for name, work in (("prefill", prefill), ("decode", decode)):
            ratio, spread = speed(run(work, moe, ids), run(work, stock, ids), options.pairs, ids)
            what = f"hidden {hidden} {name}, dense experts top-2, context {context}"
            print(f"{what}: {ratio:.2f} x Mixtral (± {spread:.2f})", flush=True)


def placed(models: list[PreTrainedModel], options: argparse.Namespace) -> list[PreTrainedModel]:
    return [model.to(options.device, getattr(torch, options.dtype)) for model in models]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of the model class beside its peers.")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load)
        return
    torch.manual_seed(0)
    print(f"{EXPERTS} LoRA experts of rank {RANK}, top-1; {options.dtype}, {options.device}")
    for hidden in options.hidden:
        factored(hidden, options)
    for hidden in options.hidden:
        against_mixtral(hidden, options)
    if options.device == "cpu":
        memory()


if __name__ == "__main__":
    main()
