"""Experts of a unified model on disk: one more, one less, and what is inside."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_moe.errors import ExpertError
from mergekit_moe.experts import read_expert
from mergekit_moe.exporting import proxies_from_file
from mergekit_moe.hub import resolve_model
from mergekit_moe.merging.membership import Unified, add, base_within, drop, read_unified, write_base
from mergekit_moe.recipe import ANCHOR, EXPERT_NAME, RESERVED_NAMES
from mergekit_moe.router_recipe import BY_STATISTICS
from mergekit_moe.workspace import new_folder

if TYPE_CHECKING:
    from datasets import Dataset


def add_expert(
    folder: Path,
    source: str,
    out: Path,
    *,
    name: str,
    revision: str | None = None,
    same_base: bool = False,
    proxies: Path | None = None,
    tell: Callable[[str], None] = print,
) -> None:
    """Write the unified model in `folder` with one more expert to the new folder `out`.

    Args:
        source: the expert's folder or Hub id.
        same_base: the user vouches that the base model that the expert names is the one that was merged.
        proxies: rows with `text` and `expert`, of every expert: the routers are fitted on them in closed form. Needed
            where they were fitted before; the experts themselves are never touched.

    Raises:
        MetaMoeError: if the expert doesn't fit, or its routers can't be made.
    """
    if not re.fullmatch(EXPERT_NAME, name) or name in (*RESERVED_NAMES, ANCHOR):
        raise ExpertError(
            f"--name {name!r}: an expert's name is of small letters, digits, - and _, and none of "
            f"{', '.join((*RESERVED_NAMES, ANCHOR))}; choose another"
        )
    unified = read_unified(folder)
    if unified.fitted and proxies is None:
        raise ExpertError(
            f"the routers of {folder} were fitted on proxies, and the new expert's rows need its own: give --proxies, "
            "rows with `text` and `expert` of every expert, or add it to the recipe and run that again"
        )
    resolved = resolve_model(source, revision, Path(), f"expert '{name}'", tell=tell)
    known = unified.report["base_weights"]
    base_weights = None if known is None else lambda: str(known)
    expert = read_expert(name, resolved, base_within(unified), base_weights=base_weights, same_base=same_base)
    with new_folder(out) as partial:
        if proxies is None:
            add(unified, expert, partial, tell)
        else:
            with _beside(partial, ".blank") as blank:
                add(_to_be_fitted(unified), expert, blank, tell)
                _fit(unified, blank, proxies, partial)


def drop_expert(
    folder: Path, name: str, out: Path, *, proxies: Path | None = None, tell: Callable[[str], None] = print
) -> None:
    """Write the unified model in `folder` without the expert `name` to the new folder `out`.

    Args:
        proxies: as for `add_expert`; without them, routers that were fitted keep the rows of those who stay.

    Raises:
        MetaMoeError: if there is no such expert, or it can't be taken out.
    """
    unified = read_unified(folder)
    with new_folder(out) as partial:
        if proxies is None:
            drop(unified, name, partial)
            if unified.fitted:
                tell("the routers were fitted on the dropped expert's proxies too; --proxies fits them anew")
        else:
            with _beside(partial, ".blank") as blank:
                drop(_to_be_fitted(unified), name, blank)
                _fit(unified, blank, proxies, partial)


@contextmanager
def _beside(partial: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder for what the routers are fitted with; inside `partial`, it goes the way of that."""
    folder = partial / name
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def _to_be_fitted(unified: Unified) -> Unified:
    """Return the model as one whose routers come from proxies, in closed form, whatever they came from before."""
    start = unified.router.start if unified.router.start in BY_STATISTICS else "lda"
    router = unified.router.model_copy(update={"start": start, "training": None})
    config = {**unified.config, "router_absolute_scores": False}
    return unified._replace(config=config, report={**unified.report, "router": router.model_dump(mode="json")})


def _fit(unified: Unified, blank: Path, proxies: Path, out: Path) -> None:
    """Fit the routers of the model in `blank` in closed form, as its recipe would, if that hadn't them trained.

    The seed's path is that of the seed which the model still holds: one whose experts are all whole FFNs holds none,
    and its proxies take their own experts' alone.
    """
    from mergekit_moe.routing.training import fit_routers

    router = _to_be_fitted(unified).router
    rows: Dataset = proxies_from_file(proxies, blank, router.max_length)
    logits = [unified.weights.read(name) for name in unified.weights if name.endswith("router.context_logit")]
    if unified.router.training is not None and logits:
        learnt = float(torch.sigmoid(torch.stack(logits).mean()))
        router = router.model_copy(update={"context_weight": learnt})
    with _beside(out, ".base") as base:
        seed = base if write_base(unified, base) else None
        fit_routers(blank, rows, router, published={}, seed=unified.report["seed"], out=out, base=seed)


def inspect_model(folder: Path) -> dict[str, Any]:
    """Return what is inside a unified model: its base, and for each expert its source, licence, ranks, size and router.

    `router_norm` is the mean over layers of the norm of the expert's row.
    """
    unified = read_unified(folder)
    sources = {entry["name"]: entry for entry in unified.report["experts"]}
    sizes = [0] * len(unified.names)
    rows = []
    for name in unified.weights:
        number = name.partition(".experts.")[2].partition(".")[0]
        if number.isdigit():
            sizes[int(number)] += unified.weights.nbytes(name)
        if name.endswith(".router.weight"):
            rows.append(unified.weights.read(name).float().norm(dim=1))
    norms = torch.stack(rows).mean(0).tolist()
    experts = []
    for entry, size, norm in zip(unified.config["experts"], sizes, norms, strict=True):
        source = sources.get(entry["name"], {"source": "base", "revision": None, "license": None, "kept": "anchor"})
        kept = {key: source[key] for key in ("source", "revision", "license", "kept")}
        experts.append({"name": entry["name"], **kept, "ranks": entry.get("ranks"), "bytes": size, "router_norm": norm})
    return {
        "base_model": unified.report["base_model"],
        "model_type": unified.config["model_type"],
        "bytes": sum(unified.weights.nbytes(name) for name in unified.weights),
        "top_k": unified.config["num_experts_per_tok"],
        "router": {
            "start": unified.router.start,
            "context": unified.config["router_context"],
            "adds_layers": unified.config["router_adds_layers"],
        },
        "experts": experts,
    }
