"""Check a recipe by what files and headers tell, and say what it will do; reads no weight."""

import functools
from collections.abc import Callable

from mergekit_moe import cards
from mergekit_moe.architectures import require_export
from mergekit_moe.checkpoint import PROCESSORS
from mergekit_moe.errors import DataError, ExpertError, MetaMoeError
from mergekit_moe.experts import STATISTICS, Expert, require_ffn_change
from mergekit_moe.image_recipe import is_of_images
from mergekit_moe.job import POOL, Job
from mergekit_moe.recipe import BY_PUBLISHED, ClipSeed, ExpertSource, TrainedSeed
from mergekit_moe.selection.embedding import resolve_embedder


def plan(job: Job, *, merging: bool = True, base: bool = True, carding: bool = False) -> list[tuple[str, str]]:
    """Check all that files and headers can tell, without reading a weight; return what will be done.

    Args:
        job: the recipe at work.
        merging: False for a client's own commands, for which one expert is enough.
        base: False for a selection, which needs no base model: none is looked for.
        carding: True if a card is going to be written, which has to name a licence.

    Raises:
        MetaMoeError: with every problem found, one a line.
    """
    problems: list[str] = []
    lines: list[tuple[str, str]] = []

    def attempt(look: Callable[[], list[tuple[str, str]]]) -> None:
        try:
            lines.extend(look())
        except MetaMoeError as error:
            if str(error) not in problems:  # every expert needs the base, whose faults are told once
                problems.append(str(error))

    if merging and len(job.recipe.experts) < 2:
        problems.append("experts: one expert can't be merged; give two or more, or run a client's commands alone")
    attempt(lambda: _plan_workspace(job))
    if base:
        attempt(lambda: _plan_base(job))
        attempt(lambda: _require_fitting(job))
    if job.recipe.pool_sources:
        attempt(lambda: _plan_pool(job))
    for target in job.recipe.export if base else ():
        attempt(functools.partial(_plan_export, job, target))
    for expert in job.recipe.experts if base else job.clients:
        attempt(functools.partial(_plan_expert, job, expert))
    if carding and not problems:
        attempt(lambda: _plan_license(job))
    if problems:
        raise DataError("\n".join(problems))
    router, merge = job.recipe.router if not base else job.router, job.recipe.merge
    if merge.method == "moe":
        added = ", layers added up" if router.add_layers else ""
        lines.append(("router", f"{router.start}, context {router.context}{added}, top-{merge.top_k}"))
    return lines


def _plan_workspace(job: Job) -> list[tuple[str, str]]:
    for name in ("embeddings", "seed", "merged", "model", "evaluation", "card"):
        job.workspace.require_free(name)
    for target in job.recipe.export:
        job.workspace.require_free(f"export/{target}")
    for source in job.recipe.experts:
        job.workspace.require_free(f"routing/{source.name}")
    for client in job.clients:
        for stage in ("proxies", "aligned", "statistics", "experts"):
            job.workspace.require_free(f"{stage}/{client.name}")
    for expert in job.foreign:
        for stage in ("gains", "proxies"):
            job.workspace.require_free(f"{stage}/{expert.name}")
    return [("workspace", str(job.workspace.root))]


def _plan_base(job: Job) -> list[tuple[str, str]]:
    if isinstance(job.recipe.base_model, TrainedSeed):
        seed = job.recipe.base_model
        what = f"{seed.layers} layers of {seed.hidden_size}, to be trained on"
        if isinstance(seed, ClipSeed):
            return [("base", f"CLIP, {what} {len(job.seed_rows):,} labelled images")]
        return [("base", f"Llama, {what} the pool")]
    base = job.base_headers
    size = sum(base.weights.nbytes(name) for name in base.weights)
    kind = base.config["model_type"]
    return [("base", f"{base.source.source} ({kind}, {size / 1e6:,.1f} MB, licence {job.base_license})")]


def _require_fitting(job: Job) -> list[tuple[str, str]]:
    """Raise DataError for what an encoder, or a model that isn't one, can't do."""
    recipe, encodes = job.recipe, job.encodes
    context = job.router.context
    _require_readable(job)
    if encodes and context in ("prefix", "prompt"):
        raise DataError(f"router.context {context} is for models that read left to right; an encoder's is mean or none")
    if not encodes and context == "mean":
        raise DataError("router.context mean is for encoders: here it would show what comes; use prefix or prompt")
    if not encodes and recipe.matches_labels:
        raise DataError("base_model is no encoder, and 'label' needs one; name one, or drop 'label'")
    if encodes and job.clients and not recipe.matches_labels:
        raise DataError(
            f"expert '{job.clients[0].name}': base_model is an encoder, which learns from rows with a label; give "
            "'label' with 'text' or 'image'"
        )
    if encodes and job.foreign:
        raise DataError(
            f"expert '{job.foreign[0].name}': expert-gain asks how well a model reads a text, and base_model is an "
            "encoder; use an expert with published proxies"
        )
    return []


def _require_readable(job: Job) -> None:
    """Raise DataError unless the base model reads what the rows are."""
    recipe, images = job.recipe, is_of_images(job.recipe)
    if isinstance(recipe.base_model, TrainedSeed):
        return
    architecture, kind = job.base_headers.architecture, job.base_headers.config["model_type"]
    if images and not architecture.images:
        raise DataError(f"base_model is a {kind}, which reads text, and rows are images; name a CLIP model")
    if architecture.images and not images and (recipe.pool_sources or recipe.matches_labels):
        raise DataError(f"base_model is a {kind}, which reads images, and rows are text; give 'image', not 'text'")
    folder = job.base_headers.source.folder
    if images and not any((folder / name).is_file() for name in PROCESSORS):
        raise DataError(
            f"base_model: {folder.name} has no {PROCESSORS[0]}, which says how an image becomes numbers; save its "
            "image processor beside it"
        )
    if job.classifies and recipe.selection.relevance == "prompts":
        raise DataError(
            f"selection.relevance prompts is of sentences, and base_model is a {kind}, which reads none; "
            "use classifier or centroid"
        )


def _plan_license(job: Job) -> list[tuple[str, str]]:
    """Look at the licences of what is there already; a client's expert takes its own, or the base's."""
    if isinstance(job.recipe.base_model, TrainedSeed) and not job.base.folder.is_dir():
        return []
    return [("licence", cards.require_license(job.recipe.card.license, job.licenses()))]


def _plan_export(job: Job, target: str) -> list[tuple[str, str]]:
    model_type = "clip" if isinstance(job.recipe.base_model, ClipSeed) else "llama"
    if isinstance(job.recipe.base_model, str):
        model_type = str(job.base_headers.config["model_type"])
    require_export(target, model_type, renormalises=job.recipe.merge.renormalise)
    return [("export", f"{target}, with gates fitted on the proxies")]


def _plan_pool(job: Job) -> list[tuple[str, str]]:
    budget, rows = job.recipe.selection.budget, len(job.pool)
    selecting = job.clients or job.foreign
    if selecting and budget > rows:
        raise DataError(
            f"selection.budget is {budget} but {POOL} has only {rows} rows; lower it, or give a larger pool"
        )
    lines = [("public pool", f"{rows:,} rows")]
    if selecting:
        embedder = "the base model's image tower"
        if not job.embeds_itself:
            name, tell = job.recipe.selection.embedder, job.workspace.report
            embedder = resolve_embedder(name, job.data_dir, tell, weights=False).source
        most = "up to " if job.recipe.selection.shorten else ""
        lines.append(("proxies", f"{most}{budget} an expert, {job.recipe.selection.method}, by {embedder}"))
    return lines


def _plan_expert(job: Job, source: ExpertSource) -> list[tuple[str, str]]:
    if source.client is not None:
        private, held_out = job.rows(source)
        assert private is not None and held_out is not None
        if len(private) == 0 or len(held_out) == 0:
            raise DataError(
                f"expert '{source.name}': {len(private)} private and {len(held_out)} "
                "held-out rows are too few; give more, or a 'test'"
            )
        return [
            (f"expert {source.name}", f"to be trained on {len(private):,} private rows; {len(held_out):,} held out")
        ]
    if isinstance(job.recipe.base_model, TrainedSeed) and not job.base.folder.is_dir():
        return [(f"expert {source.name}", f"{source.source}, to be checked once the seed is trained")]
    expert = job.expert(source, weights=False)
    _require_mergeable(job, expert)
    if job.recipe.fits_routers:
        _require_routable(job, source, expert)
    job.rows(source)
    pinned = f" at {expert.revision[:7]}" if expert.revision else ""
    what = f"{expert.source}{pinned}, {expert.kind}, licence {expert.license or 'unknown'}"
    return [(f"expert {source.name}", what)]


def _require_mergeable(job: Job, expert: Expert) -> None:
    """Raise ExpertError for what an expert can be seen to change and the merge can't keep."""
    merge, base = job.recipe.merge, job.base_headers
    if merge.method != "moe":
        return
    require_ffn_change(expert, base)
    others = [name for name in expert.updates if not base.is_ffn(name)]
    if merge.other_weights == "refuse" and expert.is_adapter and others:
        raise ExpertError(
            f"expert '{expert.name}': it changes {len(others)} tensors outside the FFNs, such as {others[0]}, and "
            "merge.other_weights is refuse; choose base or average, or drop the expert"
        )


def _require_routable(job: Job, source: ExpertSource, expert: Expert) -> None:
    """Raise ExpertError for an expert that lacks what the recipe's router is fitted on."""
    if source.proxies == "published":
        job.proxy_rows(expert)
    start = job.recipe.router.start
    if start in BY_PUBLISHED and not (expert.folder / STATISTICS).is_file():
        raise ExpertError(
            f"expert '{source.name}': {expert.folder} has no {STATISTICS}, which router.start: {start} needs; "
            "publish the expert with `metamoe publish`, or start with lda"
        )
