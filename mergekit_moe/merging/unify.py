"""Experts to one MoE checkpoint, streamed: one tensor in memory at a time, whatever the model's size."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_moe.architectures import CLASSIFIER
from mergekit_moe.checkpoint import REPORT
from mergekit_moe.experts import Base, Expert
from mergekit_moe.merging.compression import Spool
from mergekit_moe.merging.ffn_experts import FfnExpert, plan_expert
from mergekit_moe.merging.gates import GATES
from mergekit_moe.merging.heads import Head, joined_head
from mergekit_moe.merging.other_weights import Difference, find_differences, planned_shared, tell_differences
from mergekit_moe.merging.output import copy_companions, in_type, one_thread, typed_config, write_checkpoint
from mergekit_moe.recipe import ANCHOR, Merge, Router
from mergekit_moe.weights import Planned
from mergekit_moe.workspace import write_json

CODE = tuple(
    f"{name}_metamoe.py"
    for name in ("bodies", "configuration", "dense", "experts", "layers", "loading", "modeling", "routing")
)
"""The model's own code, which lies beside its weights."""
MODELING = Path(__file__).parent.parent / "modeling"


def merge_experts(
    base: Base,
    experts: list[Expert],
    merge: Merge,
    router: Router,
    *,
    out: Path,
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """Write a MoE checkpoint to the folder `out`; return its shards' sha256.

    AutoModelForCausalLM loads it; of a text encoder, AutoModel and sentence-transformers.
    The base FFN is stored once, if any expert is factored; routers that are fitted on proxies are still blank.

    Args:
        seed: of random routers and randomised SVD.
        tell: takes a line about what is lost or kept.

    Raises:
        ExpertError: if an expert holds a value that is not finite, naming its tensor, or can't be merged as asked.
        WorkspaceError: if the disk has no room.
    """
    with one_thread():
        differences = find_differences(base, experts)
    tell_differences(experts, differences, merge.other_weights, tell)
    head = joined_head(experts)
    spool = Spool(out)
    members = [
        plan_expert(expert, number, base, merge.compress, spool, seed=seed, tell=tell)
        for number, expert in enumerate(experts)
    ]
    for member in members:
        tell(f"expert '{member.entry['name']}': {member.form}")
    if merge.anchor:
        members.append(FfnExpert({"name": ANCHOR, "scale": 1.0, "ranks": {}}, []))
    config = moe_config(base, experts, members, merge, router, head)
    shares = shares_ffn(config)
    kept = [
        planned_shared(name, base, experts, merge.other_weights)
        for name in base.weights
        if (shares or not base.is_ffn(name)) and (head is None or not base.is_of_head(name))
    ]
    kept += head.tensors if head is not None else []
    sections = [kept, [tensor for member in members for tensor in member.tensors]]
    sections = [[in_type(tensor, merge.dtype) for tensor in section] for section in sections]
    sections.append(planned_routers(base, [*experts, *([None] if merge.anchor else [])], router, seed))
    digests = write_checkpoint(out, sections)
    write_json(out / "config.json", config)
    copy_companions(base, out)
    for name in CODE:
        shutil.copyfile(MODELING / name, out / name)
    write_json(out / REPORT, report_on(base, experts, members, merge, router, differences, seed))
    return digests


def moe_config(
    base: Base, experts: list[Expert], members: list[FfnExpert], merge: Merge, router: Router, joined: Head | None
) -> dict[str, Any]:
    """Return the config.json of the unified model: the base's own, plus experts, router and their common head."""
    prefix, head = base.architecture.class_prefix, base.architecture.head
    if joined is not None or CLASSIFIER[0] in base.weights:
        head = "ForImageClassification"
    autos = ("AutoModel", f"AutoModel{head.removeprefix('Model')}", *base.architecture.autos)
    excluded = sorted({token for expert in experts for token in expert.about.get("domain_free_token_ids", [])})
    config = {
        **base.config,
        **(joined.config(prefix) if joined is not None else {}),
        "model_type": f"metamoe_{base.config['model_type']}",
        "architectures": [f"MetaMoe{prefix}{head}"],
        "auto_map": {
            "AutoConfig": f"configuration_metamoe.MetaMoe{prefix}Config",
            **{auto: f"modeling_metamoe.MetaMoe{prefix}{'Model' if auto == 'AutoModel' else head}" for auto in autos},
        },
        "experts": [member.entry for member in members],
        "num_experts_per_tok": merge.top_k,
        "norm_topk_prob": merge.renormalise,
        "router_context": router.context,
        "router_absolute_scores": router.start == "arrow",
        "router_adds_layers": router.add_layers,
        "router_excluded_token_ids": excluded,
    }
    return typed_config(config, merge.dtype)


def shares_ffn(config: dict[str, Any]) -> bool:
    """Whether a unified model needs the base's own FFN: what the config's property of that name tells of a model."""
    return any(expert.get("kind") != "dense" for expert in config["experts"]) or bool(
        config["router_excluded_token_ids"]
    )


def planned_routers(base: Base, experts: list[Expert | None], router: Router, seed: int) -> list[Planned]:
    """Return every layer's router, float32: blank, or made by `router.start` where that needs no proxies.

    Args:
        experts: in their order; None is the anchor.
    """
    size, tensors = base.sized["hidden_size"], []
    gate = GATES.get(router.start, GATES["uniform"])
    logit = math.log(router.context_weight / (1.0 - router.context_weight))
    for layer, ffn in enumerate(base.blocks()):

        def rows(layer: int = layer) -> Tensor:
            names = [ANCHOR if expert is None else expert.name for expert in experts]
            return torch.stack(
                [gate(base, expert, name, layer, seed) for expert, name in zip(experts, names, strict=True)]
            )

        tensors.append(Planned(f"{ffn}.router.weight", "F32", (len(experts), size), rows))
        tensors.append(Planned(f"{ffn}.router.bias", "F32", (len(experts),), lambda: torch.zeros(len(experts))))
        if router.context != "none":
            tensors.append(Planned(f"{ffn}.router.context_logit", "F32", (), lambda: torch.tensor(logit)))
    return tensors


def report_on(
    base: Base,
    experts: list[Expert],
    members: list[FfnExpert],
    merge: Merge,
    router: Router,
    differences: dict[str, list[Difference]],
    seed: int,
) -> dict[str, Any]:
    """Return merge.json: what the model was made from and how, so that experts can be added and dropped."""
    return {
        "base_model": {"source": base.source.public_name, "revision": base.source.revision},
        "merge": merge.model_dump(mode="json"),
        "base_weights": next((e.about["base_weights"] for e in experts if "base_weights" in e.about), None),
        "router": router.model_dump(mode="json"),
        "routers_fitted": False,
        "seed": seed,
        "experts": [
            report_on_expert(expert, member, differences[expert.name])
            for expert, member in zip(experts, members, strict=False)
        ],
    }


def report_on_expert(expert: Expert, member: FfnExpert, differences: list[Difference]) -> dict[str, Any]:
    """Return an expert's part of merge.json: where it comes from, how it is kept, and what was left out of it."""
    return {
        "name": expert.name,
        "source": expert.source,
        "revision": expert.revision,
        "license": expert.license,
        "published_as": expert.kind,
        **({"labels": list(expert.labels)} if expert.labels else {}),
        "kept": member.form,
        "svd_errors": member.errors,
        "other_weights": [difference._asdict() for difference in differences],
        "domain_free_token_ids": expert.about.get("domain_free_token_ids", []),
    }
