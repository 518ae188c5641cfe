"""What the cards say: of a client's expert, of its proxy set, of the unified model. The words are in `cards/`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_moe import cards, data
from mergekit_moe.adapters import ADAPTER_CONFIG
from mergekit_moe.checkpoint import REPORT, read_config
from mergekit_moe.experts import PROXIES, Expert
from mergekit_moe.hub import PACKAGE
from mergekit_moe.job import POOL, SEED_ROWS, Job
from mergekit_moe.privacy.ledger import LEDGER, guarantee_in_words
from mergekit_moe.recipe import ClipSeed, ExpertSource, Recipe, Router, TrainedSeed
from mergekit_moe.workspace import is_main_process, read_json

if TYPE_CHECKING:
    from datasets import Dataset

_CARD = "README.md"
_TEXTS, _PICTURES = "proxies.jsonl", "proxies.parquet"
_SIMILARITY = "sentence-similarity"
_CLASSIFIES = "ForImageClassification"
_CONTEXTS = {
    "prefix": "the running mean of its prefix",
    "prompt": "the mean of the prompt, which stays as it is for the completion",
    "mean": "the mean over the whole input",
    "none": "no context",
}
_STARTS = {
    "uniform": "gives every expert the same weight",
    "random": "is random, and was never trained",
    "arrow": "has one direction an expert, the one that its weights answer most (Arrow), and takes absolute scores",
}


def write_seed_card(job: Job, settings: TrainedSeed, out: Path) -> None:
    """Write the card of a seed model that the recipe had trained to the folder `out`."""
    clip = isinstance(settings, ClipSeed)
    learnt = [data.describe(source, job.data_dir, SEED_ROWS if clip else POOL) for source in job.seed_sources]
    metadata = cards.model_metadata(
        library="transformers",
        license=settings.license,
        base_models=[],
        relation="finetune",
        datasets=_named_on_hub(learnt),
        tags=["mergekit_moe", "seed"],
    )
    facts = {"metadata": metadata, "name": f"{job.name}-seed", "settings": settings, "clip": clip, "learnt": learnt}
    (out / _CARD).write_text(cards.render("seed.md.j2", **facts), encoding="utf-8")


def write_expert_card(
    job: Job, client: ExpertSource, about: dict[str, Any], ledger: dict[str, Any], proxies: int, out: Path
) -> None:
    """Write the card of a client's published expert to the folder `out`, which holds its adapter.

    Args:
        about: its expert.json.
        ledger: its privacy.json.
        proxies: how many there are.
    """
    config = read_config(out, ADAPTER_CONFIG, f"expert '{client.name}'")
    metadata = cards.model_metadata(
        library="peft",
        license=about["license"],
        base_models=_on_hub([job.base]),
        relation="adapter",
        datasets=_pools_on_hub(job),
        tags=["lora", "mergekit_moe", "moe-expert"],
        task=_task(job, classifies="labels" in about),
    )
    card = cards.render(
        "expert.md.j2",
        metadata=metadata,
        name=client.name,
        encoder=job.encodes,
        labels=len(about.get("labels", [])),
        base_model=job.base.public_name,
        base_revision=job.base.revision,
        license=about["license"],
        rank=config["r"],
        alpha=config["lora_alpha"],
        projections=sorted(job.base_headers.architecture.projections),
        proxies=proxies,
        pool=_pools(job),
        silent_tokens=about["domain_free_token_ids"],
        ledger=_rows_of(ledger),
        total=guarantee_in_words(ledger["total"]),
        unit=ledger["unit"],
        caveats=ledger["caveats"],
    )
    (out / _CARD).write_text(card, encoding="utf-8")


def write_proxy_set(job: Job, client: ExpertSource, rows: "Dataset", out: Path) -> None:
    """Write a client's proxies as a data set of its own to the folder `out`, with its card: public rows alone."""
    images = data.has_images(rows)
    ledger = read_json(job.workspace.folder(f"experts/{client.name}") / LEDGER)
    if images:
        rows.select_columns(["id", *(["label"] if any(rows["label"]) else []), data.IMAGE]).to_parquet(out / _PICTURES)
    else:
        rows.select_columns(["id", "prompt", "completion"]).to_json(out / _TEXTS, force_ascii=False)
    licenses = {
        data.describe(source, job.data_dir, POOL): source.license or "unknown" for source in job.recipe.pool_sources
    }
    license = cards.common_license(None, licenses)
    card = cards.render(
        "proxies.md.j2",
        metadata=cards.dataset_metadata(
            license=license or "unknown",
            rows=len(rows),
            sources=_pools_on_hub(job),
            file=_PICTURES if images else _TEXTS,
        ),
        images=images,
        name=client.name,
        rows=len(rows),
        pool=licenses,
        pool_rows=len(job.pool),
        selection=job.recipe.selection,
        embedder=None if job.embeds_itself else cards.placeless(job.recipe.selection.embedder),
        guarantee=guarantee_in_words(next(entry for entry in ledger["artifacts"] if entry["file"] == PROXIES)),
    )
    (out / _CARD).write_text(card, encoding="utf-8")


def write_model_card(job: Job, out: Path) -> None:
    """Write the unified model's card to the folder `out`."""
    from mergekit_moe.evaluation import tables

    results = read_json(job.workspace.folder("evaluation") / tables.RESULTS) if job.evaluates else None
    model = job.workspace.folder(job.model)
    task = _task(
        job, classifies=read_config(model, "config.json", str(model))["architectures"][0].endswith(_CLASSIFIES)
    )
    fitted = read_json(model / "router_training.json") if job.recipe.fits_routers else None
    report = read_json(model / REPORT)
    experts = job.experts()
    license = cards.require_license(job.recipe.card.license, job.licenses())
    metadata = cards.model_metadata(
        library="sentence-transformers" if task == _SIMILARITY else "transformers",
        license=license,
        base_models=_on_hub([job.base, *experts]),
        relation="merge",
        datasets=_pools_on_hub(job),
        tags=["mergekit_moe", "metamoe", "moe", "merge"],
        language=job.recipe.card.language,
        name=job.name,
        losses=tables.unified_metrics(results) if results else {},
        task=task,
    )
    kept = {entry["name"]: entry["kept"] for entry in report["experts"]}
    card = cards.render(
        "model.md.j2",
        metadata=metadata,
        name=job.name,
        task=task,
        encoder=job.encodes,
        base_model=job.base.public_name,
        base_revision=job.base.revision,
        base_license=job.base_license,
        license=license,
        experts=[
            {
                "name": expert.name,
                "source": expert.source,
                "revision": expert.revision,
                "published_as": expert.kind,
                "kept": kept[expert.name],
                "license": expert.license or "unknown",
                "proxies": len(job.proxies(expert)["rows"]) if fitted else None,
                "guarantee": _guarantee_of(expert),
            }
            for expert in experts
        ],
        pool=_pools(job),
        top_k=job.recipe.merge.top_k,
        context=job.router.context,
        silent_tokens=read_config(model, "config.json", "model")["router_excluded_token_ids"],
        anchor=job.recipe.merge.anchor,
        router_fitted=report["routers_fitted"],
        other_weights=describe_other_weights(job.recipe, report),
        temperature=job.recipe.matching.temperature,
        judged_by=results["judged_by"] if results else "loss",
        loss_table=tables.markdown(*tables.loss_rows(results)) if results else "",
        accuracy_table=tables.markdown(*tables.accuracy_rows(results)) if results else "",
        domain_table=tables.markdown(*tables.domain_rows(results)) if results else "",
        proxy_table=tables.markdown(*tables.proxy_rows(results["proxies"])) if results and results["proxies"] else "",
        router=describe_router(job.router, fitted),
        recipe=cards.public_recipe(job.recipe),
    )
    (out / _CARD).write_text(card, encoding="utf-8")


def place_card(job: Job) -> None:
    """Put the card beside the weights; by rename, as everything else."""
    if not is_main_process():
        return
    card, target = job.workspace.folder("card") / _CARD, job.workspace.folder(job.model) / _CARD
    text = card.read_bytes()
    if not target.is_file() or target.read_bytes() != text:
        partial = target.with_name(f".{_CARD}.partial")
        partial.write_bytes(text)
        partial.replace(target)


def describe_router(router: Router, fitted: dict[str, Any] | None) -> str:
    """Return in words how tokens find their expert, and what the fit on proxies reached."""
    linear = f"Linear in each layer's FFN input, with {_CONTEXTS[router.context]}"
    if router.add_layers:
        linear += ", and added to what all layers before it said"
    if fitted is None:
        return f"{linear}; it {_STARTS[router.start]}. No proxies were used."
    closed = f"in closed form (`{router.start}`) from the proxies"
    of_no_proxies = router.start in _STARTS or router.start == "linear"
    lines = [f"{linear}; started {f'by `{router.start}`' if of_no_proxies else closed}."]
    for name, judged in fitted["held_out"].items():
        lines.append(
            f"- `{name}`: loss {judged['loss']:.4f} on held-out proxies, "
            f"{judged['routing_accuracy']:.1%} of their tokens sent to their own expert"
        )
    if "kept" in fitted:
        lines.append(f"\nKept: `{fitted['kept']}`, the better of the two on held-out proxies.")
        if fitted["kept"] == "trained" and fitted["trains"] != "router":
            lines.append("The experts were trained with the routers, so that they are not quite what was published.")
    return "\n".join(lines)


def describe_other_weights(recipe: Recipe, report: dict[str, Any]) -> list[str]:
    """Return a line for each expert that changed more than its FFNs.

    Args:
        report: the model's merge.json.
    """
    fate = "left out" if recipe.merge.other_weights == "base" else "taken into the mean over all experts"
    lines = []
    for expert in report["experts"]:
        parts = [f"`{d['module']}` ({d['relative']:.2g} of the base's norm)" for d in expert["other_weights"]]
        if parts:
            lines.append(f"{expert['name']}: {', '.join(parts)}; {fate}")
    return lines


def _rows_of(ledger: dict[str, Any]) -> list[dict[str, str]]:
    """Return a ledger's artifacts as a table shows them."""
    return [
        {**{key: entry[key] for key in ("file", "holds", "can_reveal")}, "guarantee": guarantee_in_words(entry)}
        for entry in ledger["artifacts"]
    ]


def _guarantee_of(expert: Expert) -> str:
    """Return what an expert's own ledger says of all that it publishes; nothing is known of those without one."""
    if not (expert.folder / LEDGER).is_file():
        return "not stated"
    ledger = read_config(expert.folder, LEDGER, f"expert '{expert.name}'")
    total = ledger.get("total")
    return guarantee_in_words(total) if isinstance(total, dict) and "guarantee" in total else "not stated"


def _task(job: Job, *, classifies: bool) -> str:
    """Return the Hub's word, and transformers', for what the model is for.

    Args:
        classifies: whether it has a head over labels of images.
    """
    if not job.encodes:
        return "text-generation"
    architecture = job.base_headers.architecture
    if not architecture.images:
        return _SIMILARITY
    if architecture.tower is not None:
        return "zero-shot-image-classification"
    return "image-classification" if classifies else "image-feature-extraction"


def _on_hub(models: list[Any]) -> list[str]:
    """Return the Hub ids among sources; a folder's name means nothing to a reader of the card's metadata."""
    return [model.source for model in models if model.revision is not None and not model.source.startswith(PACKAGE)]


def _pools(job: Job) -> list[str]:
    return [data.describe(source, job.data_dir, POOL) for source in job.recipe.pool_sources]


def _pools_on_hub(job: Job) -> list[str]:
    return _named_on_hub(_pools(job))


def _named_on_hub(names: list[str]) -> list[str]:
    return [name.rpartition("@")[0] for name in names if "@" in name]
