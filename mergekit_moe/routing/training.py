"""Fit the routers on the union of the proxies; all but the experts, where they train too, stays as it is."""

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.core_model_loading import revert_weight_conversion

from mergekit_moe.checkpoint import INDEX, REPORT, read_config
from mergekit_moe.data import batches, to_learn
from mergekit_moe.modeling.dense_metamoe import DenseExperts
from mergekit_moe.modeling.experts_metamoe import LowRank
from mergekit_moe.modeling.routing_metamoe import ContextRouter
from mergekit_moe.models import (
    RouterCall,
    add_teacher,
    load_model,
    network_of,
    only_chooses,
    recorded_routers,
    routed_tokens,
    routers_of,
    scored_inputs,
)
from mergekit_moe.router_recipe import NO_PROXIES, Router, RouterTraining
from mergekit_moe.routing.ambiguity import rows_by_expert, unambiguous
from mergekit_moe.routing.losses import Counts, balance_loss, count, domain_loss, z_loss
from mergekit_moe.routing.start import AS_THEY_ARE, STARTS, Material, gather_for
from mergekit_moe.routing.statistics import write_statistics
from mergekit_moe.training import PartTrainer, train
from mergekit_moe.workspace import MANIFEST, is_main_process, link_or_copy, write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_BATCH = 16
_SCALES = [2.0 ** (i / 2) for i in range(-20, 21)]
_FACTORS = [2.0**i for i in range(9)]
_ROWS_FOR_FACTOR = 32
"""Rows of each expert that tell how sure routers should be: one number is fitted."""


class RouterTrainer(PartTrainer):
    """Trainer whose losses reach the routers: by the task, straight through, by the domain, and by their own balance.

    One step is the same whether its batch lies on one process or on several, in one piece or accumulated. Only at an
    epoch's end do several repeat a few rows, so that each has a whole batch.
    """

    control: Any

    def __init__(self, *args: Any, settings: RouterTraining, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings
        self.counts: Counts | None = None
        # The loss is a share of the whole step's: the Trainer must not divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = True

    def count(self, batch: dict[str, Tensor]) -> Counts:
        """Return what a collated batch holds."""
        routed = routed_tokens(self.model, batch)
        return count(batch["labels"], routed, batch["expert"], self.model.config.num_experts)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples:
            own = functools.reduce(Counts.__add__, [self.count(batch) for batch in samples])
            self.counts = Counts(*(self.accelerator.reduce(part.to(device), "sum") for part in own))
        return samples, items

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any) -> Any:
        assert self.counts is not None
        inputs = dict(inputs)
        labels = self.count(inputs).labels
        expert = inputs.pop("expert")
        with recorded_routers(model) as calls:
            outputs = model(**inputs, use_cache=False)
        task = outputs.loss * (labels / self.counts.labels)
        loss = self.settings.task_weight * task + self.router_losses(calls, expert, self.counts)
        # Processes' gradients are averaged, and these are to be added.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def router_losses(self, calls: list[RouterCall], expert: Tensor, counts: Counts) -> Tensor | float:
        """Return the weighted sum of what the routers are trained by beside the task."""
        settings, routed = self.settings, counts.routed.sum()
        loss: Tensor | float = 0.0
        if settings.domain_weight > 0.0:
            loss = loss + settings.domain_weight * domain_loss(calls, expert, counts.routed)
        if settings.balance_weight > 0.0:
            top_k = self.model.config.num_experts_per_tok
            add = functools.partial(self.accelerator.reduce, reduction="sum")
            loss = loss + settings.balance_weight * balance_loss(calls, top_k, routed, add=add)
        if settings.z_weight > 0.0:
            loss = loss + settings.z_weight * z_loss(calls, routed)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Judge the model by the held-out proxies, as its start is judged."""
        judged = {f"eval_{name}": value for name, value in judge(self.model, self.eval_dataset).items()}
        self.log(judged)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, judged)
        return judged


def fit_routers(
    merged: Path,
    proxies: "Dataset",
    settings: Router,
    *,
    published: dict[str, Tensor],
    seed: int,
    out: Path,
    base: Path | None = None,
    gathered: Sequence[Path] = (),
) -> None:
    """Write the unified model with fitted routers to the folder `out`.

    Args:
        merged: the folder that `merge_experts` wrote.
        proxies: tokenised union of the proxies, with a column `expert`.
        published: the clients' own statistics, `count` (K,), `sum` (L, K, H) and `noise` (L, K), for starts made of
            them; they are over all proxies, those that judge included.
        base: the seed model's folder, for what it says of the proxies; the closed forms can do without it.
        gathered: the folders that `gather_expert` wrote, one an expert; without them, the proxies are passed over here.
    """
    model = load_model(merged)
    # Proxies have no labels: an encoder's task is to say of each what its own expert says.
    learnt, held_out = hold_out(add_teacher(model, proxies))
    fitted_on = start_routers(Material(model, learnt, settings, seed, published, base, list(gathered)))
    report: dict[str, Any] = {"start": settings.start, "held_out": {settings.start: judge(model, held_out)}}
    if settings.leave_out_ambiguous:
        left_out = Counter(learnt["expert"]) - Counter(fitted_on["expert"])
        report["left_out"] = {one["name"]: left_out[number] for number, one in enumerate(model.config.experts)}
    if settings.training is not None:
        before = {name: tensor.detach().clone() for name, tensor in trainable(model, settings.training).items()}
        log = train_routers(model, learnt, settings.training, seed=seed, folder=out, judges=held_out)
        report |= {"trains": settings.training.trains, "log": log}
        report["held_out"]["trained"] = judge(model, held_out)
        # Training after a merge can make it worse; held-out proxies decide, and the report says so.
        better = report["held_out"]["trained"]["loss"] <= report["held_out"][settings.start]["loss"]
        report["kept"] = "trained" if better else settings.start
        if not better:
            model.load_state_dict(before, strict=False)
    if is_main_process():
        fitted = settings.start not in NO_PROXIES or report.get("kept") == "trained"
        _write(model, merged, out, settings, fitted=fitted)
        write_json(out / "router_training.json", report)


def gather_expert(merged: Path, proxies: "Dataset", settings: Router, out: Path, *, base: Path | None = None) -> None:
    """Write to the folder `out` what the closed forms need of one expert's proxies, those that judge left out.

    Args:
        merged: a unified model that holds the expert; which others it holds changes nothing.
        proxies: the expert's own, tokenised, with its number in that model as the column `expert`.
        base: the seed model's folder; without it, the own expert's path has to do.
    """
    learnt, _ = hold_out(proxies)
    write_statistics(gather_for(load_model(merged).eval(), learnt, settings, base), proxies["expert"][0], out)


def trainable(model: "PreTrainedModel", settings: RouterTraining) -> dict[str, torch.nn.Parameter]:
    """Return what is trained, by name: routers and, where asked for, experts; never the seed's own weights."""
    kinds = (ContextRouter,) if settings.trains == "router" else (ContextRouter, LowRank, DenseExperts)
    found = {}
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False) if isinstance(module, kinds) else ():
            if settings.learn_context or name != "context_logit":
                found[f"{place}.{name}"] = parameter
    return found


def train_routers(
    model: "PreTrainedModel",
    proxies: "Dataset",
    settings: RouterTraining,
    *,
    seed: int,
    folder: Path,
    judges: "Dataset | None" = None,
) -> list[dict[str, float]]:
    """Train the routers' rows, biases and context weights in place, and the experts if they train; return the log.

    Args:
        judges: held-out proxies, for `settings.patience`.
    """
    model.requires_grad_(False)
    for parameter in trainable(model, settings).values():
        parameter.requires_grad_(True)
    with _trained_in_float32(model):
        return train(
            model,
            proxies,
            settings,
            seed=seed,
            folder=folder,
            trainer=functools.partial(RouterTrainer, settings=settings),
            mixed=True,
            judges=judges,
            patience=settings.patience,
        )


@contextmanager
def _trained_in_float32(model: "PreTrainedModel") -> Iterator[None]:
    """Inside the block, a model of which a part trains that is stored at 16 bits is float32: steps would round away."""
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad):
        yield
        return
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(stored[name])


@torch.no_grad()
def judge(model: "PreTrainedModel", proxies: "Dataset") -> dict[str, float]:
    """Return the loss in nats a token, and the share of tokens sent to their own expert, over all layers."""
    model.eval()
    loss = tokens = right = routed_tokens = 0.0
    with recorded_routers(model) as calls:
        for batch in batches(proxies, _BATCH, model.device):
            expert = batch.pop("expert")
            labels = int(to_learn(batch["labels"]).sum())
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


def start_routers(material: Material) -> "Dataset":
    """Set every router to its start, at the temperature that suits it where it isn't taken as published.

    Returns:
        The proxies that it was fitted on.
    """
    settings = material.settings
    if settings.start in NO_PROXIES:
        return material.proxies
    _take_start(material)
    if settings.leave_out_ambiguous:
        material = material.only(unambiguous(material.model, material.proxies))
        _take_start(material)
    if _scale_matters(material):
        fit_temperature(material.model, material.proxies)
    return material.proxies


def _take_start(material: Material) -> None:
    settings, routers = material.settings, routers_of(material.model)
    weights, biases = STARTS[settings.start](material)
    with torch.no_grad():
        for router, weight, bias in zip(routers, weights, biases, strict=True):
            router.weight.copy_(weight)
            router.bias.copy_(bias)
            if router.context_logit is not None:
                router.context_logit.fill_(math.log(settings.context_weight / (1.0 - settings.context_weight)))


@torch.no_grad()
def fit_temperature(model: "PreTrainedModel", proxies: "Dataset") -> None:
    """Bring routers to the temperature that suits the domains and, with several experts a token, the task."""
    routers = routers_of(model)
    for router, scale in zip(routers, best_scales(model, proxies), strict=True):
        _sharpen([router], scale)
    if model.config.num_experts_per_tok > 1:
        _sharpen(routers, best_factor(model, proxies))


def _sharpen(routers: list[ContextRouter], factor: float) -> None:
    for router in routers:
        router.weight.mul_(factor)
        router.bias.mul_(factor)


def _scale_matters(material: Material) -> bool:
    """Whether to look for a temperature: weights of several experts, or training, depend on it, not top-1's choice."""
    if material.settings.start in AS_THEY_ARE:
        return False
    return material.settings.training is not None or not only_chooses(material.model.config)


@torch.no_grad()
def best_scales(model: "PreTrainedModel", proxies: "Dataset") -> list[float]:
    """Return, for each layer, the factor on the router's logits at which the domain loss is least, by tokens.

    Closed forms take a token's prefix means for independent evidence and come out far too sure. The
    choice of experts doesn't change with the factor (where layers add up they share one); that probabilities
    are not saturated lets the task's gradient through.
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
    if routers_of(model)[0].adds_layers:
        losses = losses.sum(dim=0, keepdim=True).expand_as(losses)
    return [_SCALES[i] for i in losses.argmin(dim=1).tolist()]


@torch.no_grad()
def best_factor(model: "PreTrainedModel", proxies: "Dataset") -> float:
    """Return the factor on all routers' logits, 1 or more, at which the task loss is least.

    How well domains are told apart doesn't say what it costs to mix in another domain's expert: where that is much,
    the routers come out sure, and several experts a token are nearly one. Never less sure than the domains have it:
    experts know proxies less well than their own domain's text, so that on proxies to mix looks better than it is.
    """
    sample = proxies.select([row for rows in rows_by_expert(proxies).values() for row in rows[:_ROWS_FOR_FACTOR]])
    routers, losses = routers_of(model), []
    for factor in _FACTORS:  # powers of two: what is multiplied and divided again is what it was
        _sharpen(routers, factor)
        losses.append(judge(model, sample)["loss"])
        _sharpen(routers, 1.0 / factor)
    return _FACTORS[losses.index(min(losses))]


def _write(model: "PreTrainedModel", merged: Path, out: Path, settings: Router, *, fitted: bool) -> None:
    """Write `merged` with what was fitted: every other file is the same one on disk (a hard link where possible)."""
    from safetensors.torch import load_file, save_file

    model = network_of(model)
    changeable = trainable(model, settings.training or RouterTraining()) | trainable(model, RouterTraining())
    changed = revert_weight_conversion(model, {name: parameter.detach() for name, parameter in changeable.items()})
    weight_map = read_config(merged, INDEX, "merge")["weight_map"]
    shards = {weight_map[name] for name in changed}
    for file in (file for file in merged.rglob("*") if file.is_file()):
        if file.name not in (*shards, MANIFEST, REPORT):
            copy = out / file.relative_to(merged)
            copy.parent.mkdir(exist_ok=True)
            copy.unlink(missing_ok=True)  # of a run that was killed
            link_or_copy(file, copy)
    facts: dict[str, Any] = {"routers_fitted": fitted, "experts_trained": len(shards) > 1}
    facts["router"] = settings.model_dump(mode="json")  # may have changed since the merge
    write_json(out / REPORT, {**read_config(merged, REPORT, "merge"), **facts})
    for shard in shards:
        tensors = load_file(merged / shard)
        for name in tensors.keys() & changed.keys():
            tensors[name] = changed[name].cpu().to(tensors[name].dtype).contiguous()
        save_file(tensors, out / shard, metadata={"format": "pt"})
