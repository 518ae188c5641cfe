"""Fit the routers on the union of the proxies; experts and everything else stay as they are."""

import copy
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from mergekit_moe.checkpoint import INDEX, REPORT, read_config
from mergekit_moe.data import batches
from mergekit_moe.models import RouterCall, load_model, recorded_routers, routers_of, scored_inputs
from mergekit_moe.recipe import NO_PROXIES, Router, RouterTraining
from mergekit_moe.routing.start import STARTS, Material
from mergekit_moe.training import train
from mergekit_moe.workspace import MANIFEST, is_main_process, write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_BATCH = 16
_SCALES = [2.0 ** (-i / 2) for i in range(21)]


def domain_loss(calls: list[RouterCall], expert: Tensor) -> Tensor:
    """Cross-entropy of the routed tokens to the expert whose proxy they belong to, averaged over layers.

    Experts weigh alike, as in the closed form, however many tokens of each the batch holds.

    Args:
        expert: (B,) numbers of the experts.
    """
    routed = calls[0].routing.token_mask
    owner = expert[:, None].expand_as(routed)[routed]
    tokens_K = torch.bincount(owner, minlength=calls[0].logits.shape[-1])
    weight = 1.0 / tokens_K[owner]
    losses = [(F.cross_entropy(call.logits[routed], owner, reduction="none") * weight).sum() for call in calls]
    return torch.stack(losses).mean() / tokens_K.count_nonzero()


class RouterTrainer(Trainer):
    """Trainer whose loss reaches the routers twice: by the task, straight through, and by the domain."""

    def __init__(self, *args: Any, settings: RouterTraining, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings
        # The loss below is a mean over the batch: the Trainer must divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        expert = inputs.pop("expert")
        with recorded_routers(model) as calls:
            outputs = model(**inputs, use_cache=False)
        loss = self.settings.task_weight * outputs.loss + self.settings.domain_weight * domain_loss(calls, expert)
        return (loss, outputs) if return_outputs else loss


def fit_routers(
    merged: Path,
    proxies: "Dataset",
    settings: Router,
    *,
    published: dict[str, Tensor],
    seed: int,
    out: Path,
    base: Path | None = None,
) -> None:
    """Write the unified model with fitted routers to the folder `out`.

    Args:
        merged: the folder that `merge_experts` wrote.
        proxies: tokenised union of the proxies, with a column `expert`.
        published: the clients' own statistics, `count` (K,), `sum` (L, K, H) and `noise` (L, K), for starts made of
            them; they are over all proxies, those that judge included.
        base: the seed model's folder, for starts made of what it says of the proxies.
    """
    model = load_model(merged)
    learnt, held_out = hold_out(proxies)
    start_routers(Material(model, learnt, settings, seed, published, base))
    report: dict[str, Any] = {"start": settings.start, "held_out": {settings.start: judge(model, held_out)}}
    if settings.training is not None:
        closed_form = copy.deepcopy([router.state_dict() for router in routers_of(model)])
        report["log"] = train_routers(model, learnt, settings.training, seed=seed, folder=out)
        report["held_out"]["trained"] = judge(model, held_out)
        # Training after a merge can make it worse; held-out proxies decide, and the report says so.
        better = report["held_out"]["trained"]["loss"] <= report["held_out"][settings.start]["loss"]
        report["kept"] = "trained" if better else settings.start
        if not better:
            for router, state in zip(routers_of(model), closed_form, strict=True):
                router.load_state_dict(state)
    if is_main_process():
        _write(model, merged, out)
        write_json(out / "router_training.json", report)


def train_routers(
    model: "PreTrainedModel", proxies: "Dataset", settings: RouterTraining, *, seed: int, folder: Path
) -> list[dict[str, float]]:
    """Train the routers' rows, biases and context weights in place, and nothing else; return the log."""
    model.requires_grad_(False)
    for router in routers_of(model):
        router.requires_grad_(True)
    return train(
        model,
        proxies,
        settings,
        seed=seed,
        folder=folder,
        trainer=lambda **kwargs: RouterTrainer(settings=settings, **kwargs),
        mixed=True,
    )


@torch.no_grad()
def judge(model: "PreTrainedModel", proxies: "Dataset") -> dict[str, float]:
    """Return the loss in nats a token, and the share of tokens sent to their own expert, over all layers."""
    model.eval()
    loss = tokens = right = routed_tokens = 0.0
    with recorded_routers(model) as calls:
        for batch in batches(proxies, _BATCH, model.device):
            expert = batch.pop("expert")
            labels = int((batch["labels"][:, 1:] >= 0).sum())
            loss += float(model(**batch, use_cache=False).loss) * labels
            tokens += labels
            routed = calls[0].routing.token_mask
            for call in calls:
                right += int((call.logits.argmax(-1) == expert[:, None])[routed].sum())
                routed_tokens += int(routed.sum())
    return {"loss": loss / tokens, "routing_accuracy": right / routed_tokens}


def hold_out(proxies: "Dataset") -> tuple["Dataset", "Dataset"]:
    """Return (rows to fit on, rows to judge by): of each expert's proxies every tenth, or all if none has ten."""
    places: dict[int, int] = {}
    learnt: list[int] = []
    held_out: list[int] = []
    for row, expert in enumerate(proxies["expert"]):
        places[expert] = places.get(expert, 0) + 1
        (held_out if places[expert] % 10 == 0 else learnt).append(row)
    return proxies.select(learnt), proxies.select(held_out or learnt)


def start_routers(material: Material) -> None:
    """Set every router to its start, at the temperature that suits it; what the merge made stays."""
    settings, routers = material.settings, routers_of(material.model)
    if settings.start in NO_PROXIES:
        return
    weights, biases = STARTS[settings.start](material)
    with torch.no_grad():
        for router, weight, bias in zip(routers, weights, biases, strict=True):
            router.weight.copy_(weight)
            router.bias.copy_(bias)
            if router.context_logit is not None:
                router.context_logit.fill_(math.log(settings.context_weight / (1.0 - settings.context_weight)))
        if not _scale_matters(material):
            return
        for router, scale in zip(routers, best_scales(material.model, material.proxies), strict=True):
            router.weight.mul_(scale)
            router.bias.mul_(scale)


def _scale_matters(material: Material) -> bool:
    """Whether anything depends on the temperature: weights of several experts, or training, never top-1's choice."""
    config = material.model.config
    chooses_only = config.num_experts_per_tok == 1 and config.norm_topk_prob
    return material.settings.training is not None or not chooses_only


@torch.no_grad()
def best_scales(model: "PreTrainedModel", proxies: "Dataset") -> list[float]:
    """Return, for each layer, the factor on the router's logits at which the domain loss is least.

    Closed forms take a token's prefix means for independent evidence and come out far too sure. The
    choice of experts doesn't change with the factor; that probabilities are not saturated lets the
    task's gradient through.
    """
    model.eval()
    losses = torch.zeros(len(routers_of(model)), len(_SCALES), dtype=torch.float64)
    with recorded_routers(model) as calls:
        for batch in batches(proxies, _BATCH, model.device):
            expert = batch["expert"]
            model(**scored_inputs(model, batch), forced_expert=expert, use_cache=False)
            routed = calls[0].routing.token_mask
            owner = expert[:, None].expand_as(routed)[routed]
            for layer, call in enumerate(calls):
                for i, scale in enumerate(_SCALES):
                    losses[layer, i] += float(F.cross_entropy(call.logits[routed] * scale, owner, reduction="sum"))
    return [_SCALES[i] for i in losses.argmin(dim=1).tolist()]


def _write(model: "PreTrainedModel", merged: Path, out: Path) -> None:
    """Write `merged` with new routers: every other file is the same one on disk (a hard link where possible)."""
    from safetensors.torch import save_file

    weight_map = read_config(merged, INDEX, "merge")["weight_map"]
    (shard,) = {file for tensor, file in weight_map.items() if ".router." in tensor}
    names = {tensor for tensor, file in weight_map.items() if file == shard}
    state = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    assert state.keys() == names
    for file in merged.iterdir():
        if file.name not in (shard, MANIFEST, REPORT):
            _link(file, out / file.name)
    write_json(out / REPORT, {**read_config(merged, REPORT, "merge"), "routers_fitted": True})
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in state.items()}, str(out / shard), metadata={"format": "pt"}
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
