"""Experts that come to a unified model, or leave it: what is written is what a merge of the new set would write."""

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from mergekit_moe.architectures import architecture_of
from mergekit_moe.checkpoint import REPORT, read_config, shards_of
from mergekit_moe.errors import ExpertError
from mergekit_moe.experts import Base, Expert
from mergekit_moe.hub import Resolved
from mergekit_moe.merging.compression import Spool
from mergekit_moe.merging.ffn_experts import FfnExpert, plan_expert
from mergekit_moe.merging.gates import GATES
from mergekit_moe.merging.other_weights import find_differences, tell_differences
from mergekit_moe.merging.output import copy_companions, in_type, write_checkpoint
from mergekit_moe.merging.unify import CODE, MODELING, report_on_expert, shares_ffn
from mergekit_moe.recipe import ANCHOR, Merge, Router
from mergekit_moe.recipe_file import in_words
from mergekit_moe.weights import Planned, Weights, passed_through
from mergekit_moe.workspace import write_json

_PREFIX = "metamoe_"
_CLASS_PREFIX = "MetaMoe"
_EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<number>\d+)\.(?P<rest>.+)")
_ADDED = (
    *("experts", "num_experts_per_tok", "norm_topk_prob", "router_context", "router_absolute_scores"),
    *("router_adds_layers", "router_excluded_token_ids", "auto_map"),
)


class Unified(NamedTuple):
    """A unified model on disk, known by its config, headers and report."""

    folder: Path
    config: dict[str, Any]
    report: dict[str, Any]
    weights: Weights

    @property
    def names(self) -> list[str]:
        return [expert["name"] for expert in self.config["experts"]]

    @property
    def fitted(self) -> bool:
        """Whether its routers came from proxies, so that they can't be made again from weights alone."""
        return self.report["routers_fitted"] or self.router.start not in GATES

    @property
    def router(self) -> Router:
        """How its routers were made."""
        return Router.model_validate(self.report["router"])

    @property
    def merge(self) -> Merge:
        """How it was merged."""
        values = self.report["merge"]
        if isinstance(values, dict):
            values = {key: value for key, value in values.items() if value is not None and key in _KEPT}
        return Merge.model_validate(values)


_KEPT = ("top_k", "renormalise", "anchor", "other_weights", "compress", "dtype")


def read_unified(folder: Path) -> Unified:
    """Return a unified model, from its config and headers.

    Raises:
        ExpertError: if the folder holds none, or one that wasn't made by `metamoe`.
    """
    what = str(folder)
    config = read_config(folder, "config.json", what)
    if not str(config.get("model_type")).startswith(_PREFIX) or not config.get("experts"):
        raise ExpertError(
            f"{folder} holds a model of type {config.get('model_type')!r}, not one that `metamoe merge` made"
        )
    report = read_config(folder, REPORT, what)
    if not {"base_model", "merge", "router", "routers_fitted", "experts", "seed"} <= report.keys():
        raise ExpertError(f"{what}: {folder / REPORT} is not what `metamoe merge` writes; merge again")
    unified = Unified(folder, config, report, Weights(folder, shards_of(folder, what), what))
    for part in ("router", "merge"):
        try:
            getattr(unified, part)
        except ValidationError as error:
            raise ExpertError(in_words(error, f"{folder / REPORT}: {part}")) from None
    return unified


def base_within(unified: Unified) -> Base:
    """Return the base model that a unified model still holds.

    Where all its experts are whole FFNs it holds no FFN of the base; the first expert's stand there for their sizes.
    """
    config = {key: value for key, value in unified.config.items() if key not in _ADDED}
    config["model_type"] = config["model_type"].removeprefix(_PREFIX)
    named = unified.report["base_model"]
    source = Resolved(unified.folder, named["source"], named["revision"])
    shards = shards_of(unified.folder, str(unified.folder))
    projections = {name.replace(".", "_"): name for name in architecture_of(config, str(unified.folder)).projections}
    held = {name for header in shards.values() for name in header}
    for shard, header in shards.items():
        own = {name: facts for name, facts in header.items() if ".router." not in name and not _EXPERT.fullmatch(name)}
        for name, facts in header.items():
            match = _EXPERT.fullmatch(name)
            whole = match is not None and match["number"] == "0" and ".lora_" not in name
            if match and whole:
                projection, _, part = match["rest"].rpartition(".")
                named = f"{match['block']}.{projections[projection]}.{part}"
                if named not in held:
                    own[named] = facts
        shards[shard] = own
    return Base(source, config, Weights(unified.folder, shards, str(unified.folder)))


def write_base(unified: Unified, out: Path) -> bool:
    """Write the base model that a unified model still holds to the folder `out`, and return True; False if it doesn't.

    A head that joins its experts' labels, and means over its experts, aren't the base's.
    """
    base = base_within(unified)
    if not _holds_ffn(unified, base):
        return False
    own = [name for name in unified.weights if ".router." not in name and not _EXPERT.fullmatch(name)]
    write_checkpoint(out, [[passed_through(unified.weights, name) for name in own]])
    classes = [name.removeprefix(_CLASS_PREFIX) for name in base.config["architectures"]]
    write_json(out / "config.json", {**base.config, "architectures": classes})
    copy_companions(base, out)
    return True


def _holds_ffn(unified: Unified, base: Base) -> bool:
    return all(name in unified.weights for name in base.ffn_weights())


def drop(unified: Unified, name: str, out: Path) -> None:
    """Write the model without one expert to the folder `out`; the others' rows of the routers stay as they are.

    Raises:
        ExpertError: if there is no such expert, too few are left, or its weights are mixed into the others'.
    """
    if name not in unified.names:
        raise ExpertError(f"{unified.folder} has no expert '{name}'; it has {', '.join(unified.names)}")
    _require_unmixed(unified, f"expert '{name}' can't be dropped")
    number = unified.names.index(name)
    left = [expert for expert in unified.config["experts"] if expert["name"] != name]
    top_k = _top_k(unified, len(left))
    if len(left) < max(2, top_k):
        raise ExpertError(
            f"expert '{name}' can't be dropped: {len(left)} would be left, and the model sends every token to {top_k} "
            "of at least 2"
        )
    entries = [entry for entry in unified.report["experts"] if entry["name"] != name]
    anchor = unified.merge.anchor and name != ANCHOR
    changed = _changed(unified, left, entries, top_k=top_k, anchor=anchor)
    _write(unified, changed, base_within(unified), [*range(number), *range(number + 1, len(left) + 1)], {}, out)


def add(unified: Unified, expert: Expert, out: Path, tell: Any = lambda line: None) -> None:
    """Write the model with one more expert to the folder `out`; the others and their rows stay as they are.

    The new rows of the routers are made as the others were, or are blank where those were fitted on proxies.

    Raises:
        ExpertError: if the name is taken, or the expert doesn't fit.
    """
    if expert.name in unified.names:
        raise ExpertError(
            f"{unified.folder} already has an expert '{expert.name}'; drop it first, or choose another name"
        )
    _require_unmixed(unified, f"expert '{expert.name}' can't be added")
    base, merge = base_within(unified), unified.merge
    holds_ffn = _holds_ffn(unified, base)
    if not holds_ffn and expert.is_adapter:
        raise ExpertError(
            f"expert '{expert.name}' is an adapter, and {unified.folder} holds no FFN of the base, since all its "
            "experts are whole; merge them again with the adapter, or with merge.anchor"
        )
    differences = find_differences(base, [expert])
    tell_differences([expert], differences, merge.other_weights, tell)
    number = len(unified.names) - int(merge.anchor)
    spool, seed = Spool(out), unified.report["seed"]
    compress = merge.compress if holds_ffn else None
    member = plan_expert(expert, number, base, compress, spool, seed=seed, tell=tell)
    tell(f"expert '{expert.name}': {member.form}")
    experts = list(unified.config["experts"])
    experts.insert(number, member.entry)
    entries = [*unified.report["experts"], report_on_expert(expert, member, differences[expert.name])]
    changed = _changed(unified, experts, entries, top_k=_top_k(unified, len(experts)))
    start, size = unified.router.start, base.sized["hidden_size"]
    by_change = start == "arrow" and not unified.fitted  # a row that is made of what the expert changed
    if not holds_ffn and (shares_ffn(changed.config) or by_change):
        raise ExpertError(
            f"expert '{expert.name}' needs the base's FFN, which {unified.folder} doesn't hold; merge again"
        )

    def row(layer: int) -> Tensor:
        if unified.fitted:
            return torch.zeros(size)
        return GATES[start](base, expert, expert.name, layer, seed)

    order: list[Any] = [*range(number), row, *range(number, len(unified.names))]
    _write(unified, changed, base, order, {number: member}, out)


def _top_k(unified: Unified, experts: int) -> int:
    """Return how many experts take each token: as before, or all where they share it alike."""
    uniform = unified.router.start == "uniform" and not unified.fitted
    return experts if uniform else unified.config["num_experts_per_tok"]


def _changed(unified: Unified, experts: list[Any], entries: list[Any], *, top_k: int, **merge: Any) -> Unified:
    """Return the model as it will be, but for its weights.

    Args:
        experts: for the config.
        entries: for the report.
        merge: settings of the merge that change, beside `top_k`.
    """
    excluded = sorted({token for entry in entries for token in entry["domain_free_token_ids"]})
    own = {"experts": experts, "router_excluded_token_ids": excluded, "num_experts_per_tok": top_k}
    settings = {**unified.report["merge"], "top_k": top_k, **merge}
    report = {**unified.report, "merge": settings, "experts": entries}
    return unified._replace(config={**unified.config, **own}, report=report)


def _require_unmixed(unified: Unified, what: str) -> None:
    if any(expert.get("labels") for expert in unified.report["experts"]):
        raise ExpertError(
            f"{what}: the head of {unified.folder} joins the labels of all its experts; merge again from the recipe"
        )
    if unified.merge.other_weights == "average":
        raise ExpertError(
            f"{what}: outside the FFNs, {unified.folder} holds the mean over its experts (merge.other_weights: "
            "average), which changes with their number; merge again from the recipe"
        )


def _write(
    unified: Unified, changed: Unified, base: Base, rows: list[Any], added: dict[int, FfnExpert], out: Path
) -> None:
    """Write the changed model.

    Args:
        changed: what it will be, from `_changed`.
        base: within the old one.
        rows: for each expert of the new model its number in the old one, or what makes its row of a layer's router.
        added: numbers of new experts -> those.
    """
    places = {old: new for new, old in enumerate(rows) if isinstance(old, int)}
    shares = shares_ffn(changed.config)
    kept, routers = [], []
    by_expert: dict[int, list[Planned]] = {new: [] for new in range(len(rows))}
    for name in unified.weights:
        match = _EXPERT.fullmatch(name)
        if match is not None:
            if int(match["number"]) in places:
                new = places[int(match["number"])]
                renamed = f"{match['block']}.experts.{new}.{match['rest']}"
                by_expert[new].append(passed_through(unified.weights, name, renamed))
        elif ".router." in name:
            routers.append(name)
        elif shares or not base.is_ffn(name):
            kept.append(passed_through(unified.weights, name))
    for number, member in added.items():
        by_expert[number] = [in_type(tensor, unified.merge.dtype) for tensor in member.tensors]
    experts = [tensor for number in sorted(by_expert) for tensor in by_expert[number]]
    write_checkpoint(out, [kept, experts, [_rerouted(unified, name, rows) for name in _by_layer(routers)]])
    write_json(out / "config.json", changed.config)
    write_json(out / REPORT, changed.report)
    copy_companions(base, out)
    for file in CODE:
        own = unified.folder / file
        shutil.copyfile(own if own.is_file() else MODELING / file, out / file)


def _by_layer(names: list[str]) -> list[str]:
    """Return router tensors in the order in which a merge writes them."""
    parts = {"weight": 0, "bias": 1, "context_logit": 2}

    def place(name: str) -> tuple[int, int]:
        (layer,) = re.findall(r"\.(\d+)\.", name)
        return int(layer), parts[name.rpartition(".")[2]]

    return sorted(names, key=place)


def _rerouted(unified: Unified, name: str, rows: list[Any]) -> Planned:
    """Return a router's tensor for the new experts."""
    planned = passed_through(unified.weights, name)
    if not planned.shape:
        return planned
    (layer,) = re.findall(r"\.(\d+)\.", name)

    def make() -> Tensor:
        old = planned.make()
        if old.ndim == 1:
            return torch.stack([old[row] if isinstance(row, int) else torch.zeros(()) for row in rows])
        return torch.stack([old[row] if isinstance(row, int) else row(int(layer)) for row in rows])

    return planned._replace(shape=(len(rows), *planned.shape[1:]), make=make, check=None)
