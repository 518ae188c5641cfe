"""The straight line from a recipe to a model card, one step after the other.

`steps` is the whole of it. Each step makes one folder of the workspace; its inputs say when it is stale.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_moe import carding, cards, data, protecting, selecting
from mergekit_moe.adapters import ADAPTER, ADAPTER_CONFIG
from mergekit_moe.checkpoint import license_of
from mergekit_moe.errors import DataError, ExpertError, RecipeError, WorkspaceError
from mergekit_moe.experts import PROXIES, STATISTICS, read_proxies
from mergekit_moe.job import Job, published_files
from mergekit_moe.plan import plan
from mergekit_moe.privacy.ledger import LEDGER
from mergekit_moe.recipe import ANCHOR, ClipSeed, ExpertSource, TrainedSeed
from mergekit_moe.router_recipe import BY_PUBLISHED, BY_STATISTICS
from mergekit_moe.workspace import digest, is_main_process, read_json, require_whole_models

if TYPE_CHECKING:
    from datasets import Dataset

COMMANDS = ("select", "seed", "align", "publish", "merge", "train-router", "evaluate", "card", "export")


class Step(NamedTuple):
    """One folder of the workspace and how it is made."""

    command: str
    folder: str
    inputs: dict[str, Any]
    make: Callable[[Path], dict[str, str] | None]
    """May return the sha256 of files that it knows from writing them."""
    distributed: bool = False
    """True if all processes of `accelerate launch` work on it; else the main one does."""
    resumable: bool = False
    """True if `make` goes on with what a killed run left."""


def run(job: Job, only: str | None = None) -> None:
    """Walk the line; with `only`, make that command's folders and require those before it.

    Raises:
        MetaMoeError: for whatever a user can have got wrong, before any long work starts where possible.
    """
    require_whole_models()
    checked = done = False
    order = _in_order(job)

    def check() -> None:
        nonlocal checked
        if not checked:
            checked = True
            merging = only is None or COMMANDS.index(only) >= COMMANDS.index("merge")
            plan(
                job,
                merging=merging,
                base=only != "select" or bool(job.foreign) or job.embeds_itself,
                carding=only in (None, "card") and job.recipe.merge.method == "moe",
            )

    try:
        for step in steps(job):
            done = done or step.command == only
            current = job.workspace.is_current(step.folder, step.inputs)
            if only is not None and step.command != only:
                if order.index(step.command) > order.index(only):
                    break
                if not current:
                    raise _stale(job, step)
                continue
            if not current:
                check()
            make = step.make if step.distributed or is_main_process() else _nothing
            job.workspace.build(step.folder, step.inputs, make, resumable=step.resumable)
    except (ExpertError, DataError):
        check()  # what is wrong with one of the inputs is told along with what is wrong with the others
        raise
    if only is not None and not done:
        raise RecipeError(f"this recipe has nothing for `metamoe {only}` to do; `metamoe check` prints what it will do")
    if only in (None, "card") and job.recipe.merge.method == "moe":
        carding.place_card(job)


def is_current(job: Job, last: str) -> bool:
    """Whether all that the commands up to `last` make is there, and from what the recipe and its data are now."""
    return _first_stale(job, last) is None


def require_current(job: Job, last: str) -> None:
    """Raise WorkspaceError, which says what to run, unless `is_current`."""
    if step := _first_stale(job, last):
        raise _stale(job, step)


def _first_stale(job: Job, last: str) -> Step | None:
    order = _in_order(job)
    for step in steps(job):
        if order.index(step.command) > order.index(last):
            break
        if not job.workspace.is_current(step.folder, step.inputs):
            return step
    return None


def _stale(job: Job, step: Step) -> WorkspaceError:
    return WorkspaceError(
        f"{job.workspace.folder(step.folder)} is missing or out of date; "
        f"run `metamoe {step.command}` on this recipe first"
    )


def steps(job: Job) -> Iterator[Step]:
    """Yield the steps in order. Each is made before the next is asked for, so inputs may read its folder."""
    recipe, seed = job.recipe, {"seed": job.recipe.seed}
    pool = {"pool": job.pool_fingerprint} if recipe.pool_sources else {}
    matching = {"matching": recipe.matching.model_dump(mode="json")} if recipe.matches_labels else {}
    inputs: dict[str, Any]
    if job.embeds_itself:
        yield from _seed_step(job)
    if job.clients or job.foreign:
        inputs = pool | job.embedder_identity()
        yield Step(
            "select",
            "embeddings",
            inputs,
            lambda out: selecting.embed_pool_of(job, out),
            distributed=True,
            resumable=True,
        )
    for client in job.clients:
        inputs = {
            "selection": recipe.selection.model_dump(mode="json"),
            "embeddings": job.workspace.digest_of("embeddings", "select"),
            "private": job.private_fingerprint(client),
            "prompts": client.client.prompts if client.client else [],
            "held_out": job.held_out_fingerprint(client),
            "tags": [client.client.tag if client.client else None, *(source.tag for source in recipe.pool_sources)],
            "privacy": protecting.asked(job, client, "relevance"),
        }
        make = functools.partial(selecting.select_for_client, job, client)
        yield Step("select", f"proxies/{client.name}", inputs | seed, make, distributed=True)
    for expert in job.foreign:
        source = job.expert(expert)
        read = {
            "max_length": recipe.router.max_length,
            "expert": source.revision or published_files(source),
            "base": job.base_identity,
        }
        make = functools.partial(selecting.measure_gains, job, source)
        yield Step("select", f"gains/{expert.name}", pool | read, make, distributed=True, resumable=True)
        inputs = {
            "selection": recipe.selection.model_dump(mode="json"),
            "embeddings": job.workspace.digest_of("embeddings", "select"),
            "gains": job.workspace.digest_of(f"gains/{expert.name}", "select"),
        }
        make = functools.partial(selecting.select_for_foreign, job, expert)
        yield Step("select", f"proxies/{expert.name}", inputs | seed, make, distributed=True)
    if not job.embeds_itself:
        yield from _seed_step(job)
    for client in job.clients:
        base = {"base": job.base_identity}
        inputs = {
            "alignment": recipe.alignment.model_dump(mode="json"),
            "private": job.private_fingerprint(client),
            "proxies": job.workspace.digest_of(f"proxies/{client.name}", "select", (PROXIES,)),
            "privacy": protecting.asked(job, client, "expert"),
            **matching,
        }
        make = functools.partial(align_client, job, client)
        yield Step("align", f"aligned/{client.name}", inputs | base | seed, make, distributed=True, resumable=True)
    for client in job.clients:
        make = functools.partial(protecting.noised_statistics_of, job, client)
        base = {"base": job.base_identity}
        read = {"max_length": recipe.router.max_length, "domain_free_bos": recipe.alignment.domain_free_bos}
        if noised := protecting.asked(job, client, "statistics"):
            inputs = {"privacy": noised, "private": job.private_fingerprint(client)} | pool | seed
            yield Step("publish", f"statistics/{client.name}", inputs | base | read, make)
        inputs = {
            "adapter": job.workspace.digest_of(f"aligned/{client.name}", "align", (ADAPTER, ADAPTER_CONFIG)),
            "proxies": job.workspace.digest_of(f"proxies/{client.name}", "select", (PROXIES,)),
            "about": [job.base.public_name, job.base.revision, client.license or job.base_license],
            "privacy": {part: mechanism._asdict() for part, mechanism in protecting.spent_by(job, client).items()},
            "statistics": job.workspace.digest_of(f"statistics/{client.name}", "publish") if noised else None,
        }
        make = functools.partial(publish_client, job, client)
        yield Step("publish", f"experts/{client.name}", inputs | base | read | pool, make)
        inputs = {
            "proxies": inputs["proxies"],
            "selection": recipe.selection.model_dump(mode="json"),
            "licenses": [source.license for source in recipe.pool_sources],
            "ledger": job.workspace.digest_of(f"experts/{client.name}", "publish", (LEDGER,)),
        }
        make = functools.partial(_publish_proxies, job, client)
        yield Step("publish", f"proxy-sets/{client.name}", inputs | pool, make)
    experts = {"experts": job.expert_identities()}
    router = job.router
    inputs = {
        "merge": recipe.merge.model_dump(mode="json"),
        "router": [router.start, router.context, router.context_weight, router.add_layers],
        "base": job.base_stamp,
    }
    yield Step("merge", "merged", inputs | experts | seed, lambda out: _merge(job, out))
    if recipe.merge.method != "moe":
        return
    if recipe.fits_routers:
        gathered = []
        for number, (name, identity) in enumerate(_gathering(job)):
            make = functools.partial(_gather, job, number)
            yield Step("train-router", f"routing/{name}", identity | pool | seed, make, distributed=True)
            gathered.append(job.workspace.digest_of(f"routing/{name}", "train-router"))
        inputs = {"router": router.model_dump(mode="json"), "merged": job.workspace.digest_of("merged", "merge")}
        inputs |= {"gathered": gathered} | pool | experts | seed
        yield Step("train-router", "model", inputs, lambda out: _route(job, out), distributed=True, resumable=True)
    model = {"model": job.workspace.digest_of(job.model, "train-router" if recipe.fits_routers else "merge")}
    inputs = {"name": [job.name, job.base.public_name, job.base.revision, job.base_license]}
    if job.evaluates:
        judged = {
            "evaluation": recipe.evaluation.model_dump(mode="json"),
            "held_out": [job.held_out_fingerprint(expert) for expert in recipe.experts],
            "tasks": [task.model_dump(mode="json") for expert in recipe.experts if (task := expert.task)],
            "selection": [job.workspace.digest_of(f"proxies/{client.name}", "select") for client in job.clients],
        }
        yield Step("evaluate", "evaluation", judged | model | matching, lambda out: _evaluate(job, out))
        inputs["evaluation"] = job.workspace.digest_of("evaluation", "evaluate")
    inputs |= {
        "recipe": digest(cards.public_recipe(recipe)),
        "about": [expert.about for expert in job.experts()],
    }
    yield Step("card", "card", inputs | model, lambda out: carding.write_model_card(job, out))
    for target in recipe.export:
        inputs = {"target": target, "card": job.workspace.digest_of("card", "card")}
        yield Step("export", f"export/{target}", inputs | model | pool, functools.partial(_export, job, target))


def _in_order(job: Job) -> tuple[str, ...]:
    """Return the commands in the order of their steps: a seed that embeds the pool is there before it."""
    return ("seed", "select", *COMMANDS[2:]) if job.embeds_itself else COMMANDS


def _seed_step(job: Job) -> Iterator[Step]:
    """Yield the step that trains the base model, where the recipe has it trained."""
    settings = job.recipe.base_model
    if not isinstance(settings, TrainedSeed):
        return
    inputs = {"model": settings.model_dump(mode="json", exclude={"rows"}), "seed": job.recipe.seed}
    learnt = {"rows": job.seed_fingerprint} if isinstance(settings, ClipSeed) else {"pool": job.pool_fingerprint}
    make = functools.partial(_train_seed, job)
    yield Step("seed", "seed", inputs | learnt, make, distributed=True, resumable=True)


def _nothing(out: Path) -> None:
    """What the other processes do in a step that is the main one's."""


def _train_seed(job: Job, out: Path) -> None:
    from mergekit_moe.seed import train_clip_seed, train_seed

    settings = job.recipe.base_model
    assert isinstance(settings, TrainedSeed)
    if isinstance(settings, ClipSeed):
        train_clip_seed(job.seed_rows, settings, seed=job.recipe.seed, out=out)
    else:
        train_seed(job.seed_rows, settings, seed=job.recipe.seed, out=out)
    carding.write_seed_card(job, settings, out)


def align_client(job: Job, client: ExpertSource, out: Path) -> None:
    """Train a client's expert."""
    from datasets import concatenate_datasets

    from mergekit_moe.alignment import align_expert

    private = rows = job.private_rows(client)
    if job.recipe.alignment.proxies:
        proxies = read_proxies(job.workspace.folder(f"proxies/{client.name}"), client.name)
        rows = concatenate_datasets([rows, job.pool.select(proxies["rows"])])
    align_expert(
        job.base.folder,
        rows,
        job.recipe.alignment,
        name=client.name,
        seed=job.recipe.seed,
        out=out,
        privacy=job.recipe.privacy_of(client),
        private_rows=len(private),
        # A head's rows are published: those of public labels would be in every expert's.
        names=data.label_names(private, *([] if job.classifies else [job.pool])),
        temperature=job.recipe.matching.temperature,
    )


def publish_client(job: Job, client: ExpertSource, out: Path) -> None:
    """Assemble the folder that a client may publish, its ledger and its card."""
    from mergekit_moe.alignment import domain_free_tokens
    from mergekit_moe.models import load_reader
    from mergekit_moe.publication import publish_expert

    reader = load_reader(job.base.folder)
    about: dict[str, Any] = {
        "name": client.name,
        "base_model": job.base.public_name,
        "base_revision": job.base.revision,
        "base_weights": job.base_weights,
        "license": client.license or job.base_license,
        "domain_free_token_ids": domain_free_tokens(reader, job.recipe.alignment),
    }
    about |= {"labels": data.label_names(job.private_rows(client))} if job.classifies else {}
    proxies = read_proxies(job.workspace.folder(f"proxies/{client.name}"), client.name)
    publish_expert(
        job.workspace.folder(f"aligned/{client.name}"),
        job.base.folder,
        about=about,
        proxies=proxies,
        proxy_tokens=data.tokenize(job.pool.select(proxies["rows"]), reader, job.recipe.router.max_length),
        statistics=protecting.statistics_file(job, client),
        out=out,
    )
    ledger = protecting.ledger_of(job, client, out)
    carding.write_expert_card(job, client, about, ledger, len(proxies["rows"]), out)


def _publish_proxies(job: Job, client: ExpertSource, out: Path) -> None:
    proxies = read_proxies(job.workspace.folder(f"proxies/{client.name}"), client.name)
    carding.write_proxy_set(job, client, job.pool.select(proxies["rows"]), out)


def _merge(job: Job, out: Path) -> dict[str, str]:
    recipe = job.recipe
    if recipe.merge.method != "moe":
        from mergekit_moe.merging.baselines import merge_densely

        return merge_densely(job.base_model, job.experts(), recipe.merge, out=out, seed=recipe.seed)
    from mergekit_moe.merging.unify import merge_experts

    tell = job.workspace.report
    return merge_experts(job.base_model, job.experts(), recipe.merge, job.router, out=out, seed=recipe.seed, tell=tell)


def _gathering(job: Job) -> list[tuple[str, dict[str, Any]]]:
    """Return each expert whose statistics the routers are fitted on, and what those depend on: on no other expert.

    The anchor's proxies are rows that no expert has taken, so that it depends on them all.
    """
    recipe, router = job.recipe, job.router
    if router.start not in BY_STATISTICS:
        return []
    merged = job.workspace.folder("merged")
    shared = {
        "router": [router.context, router.context_weight, router.max_length],
        "paths": ["own", "seed"],
        "base": job.base_stamp,
        "merge": [recipe.merge.dtype, recipe.merge.compress and recipe.merge.compress.model_dump()],
        "domain_free": read_json(merged / "config.json")["router_excluded_token_ids"],
        # Outside the FFNs, the model then holds a mean over all experts.
        "mean": job.workspace.digest_of("merged", "merge") if recipe.merge.other_weights == "average" else None,
    }
    known = [job.expert(source, weights=False) for source in recipe.experts]
    rows = [digest(job.proxies(expert)["rows"]) for expert in known]
    identities = zip(known, job.expert_identities(), rows, strict=False)  # what was picked here comes last, all at once
    found = [(expert.name, {"expert": own, "proxies": picked} | shared) for expert, own, picked in identities]
    return found + ([(ANCHOR, {"proxies": rows} | shared)] if recipe.merge.anchor else [])


def _gather(job: Job, number: int, out: Path) -> None:
    from mergekit_moe.routing.training import gather_expert

    merged, base = job.workspace.folder("merged"), job.base.folder
    gather_expert(merged, _tokens_of(job, number), job.router, out, base=base)


def _route(job: Job, out: Path) -> None:
    import torch

    from mergekit_moe.models import read_statistics
    from mergekit_moe.routing.training import fit_routers

    published_by = job.experts() if job.recipe.router.start in BY_PUBLISHED else []
    parts = [read_statistics(expert.folder / STATISTICS) for expert in published_by]
    published = {"count": torch.stack([p["count"] for p in parts])} if parts else {}
    published |= {key: torch.stack([p[key] for p in parts], dim=1) for key in ("sum", "noise") if parts}
    fit_routers(
        job.workspace.folder("merged"),
        _proxy_tokens(job),
        job.router,
        published=published,
        seed=job.recipe.seed,
        out=out,
        base=job.base.folder,
        gathered=[job.workspace.folder(f"routing/{name}") for name, _ in _gathering(job)],
    )


def _proxy_tokens(job: Job) -> "Dataset":
    """Return the tokenised union of the proxies, with a column `expert`."""
    from datasets import concatenate_datasets

    count = len(job.recipe.experts) + job.recipe.merge.anchor
    return concatenate_datasets([_tokens_of(job, number) for number in range(count)])


def _tokens_of(job: Job, number: int) -> "Dataset":
    """Return one expert's tokenised proxies, with its number as the column `expert`; the anchor's come last."""
    from mergekit_moe.models import load_reader

    if number == len(job.recipe.experts):
        name, rows = ANCHOR, job.anchor_rows()
    else:
        expert = job.expert(job.recipe.experts[number])
        name, rows = expert.name, job.proxy_rows(expert)
    max_length = job.recipe.router.max_length
    tokens = data.tokenize(rows, load_reader(job.base.folder), max_length)
    if len(tokens) == 0:
        raise DataError(
            f"expert '{name}': no proxy has a token to learn within router.max_length {max_length}; raise it"
        )
    return tokens.add_column("expert", [number] * len(tokens))


def _export(job: Job, target: str, out: Path) -> None:
    from mergekit_moe.exporting import fill_export

    license = license_of(job.workspace.folder("card"))
    name = f"{job.name}-{target}"
    fill_export(job.workspace.folder("model"), target, _proxy_tokens(job), name=name, license=license, out=out)


def _evaluate(job: Job, out: Path) -> None:
    from mergekit_moe.evaluation.compare import Domain, evaluate_models

    domains = []
    for number, source in enumerate(job.recipe.experts):
        held_out = job.rows(source)[1]
        if held_out is not None:
            domains.append(Domain(number, source.name, held_out, source.task))
    evaluate_models(
        job.base.folder,
        {expert.name: expert.folder for expert in job.experts()},
        job.workspace.folder(job.model),
        domains,
        job.recipe.evaluation,
        proxy_shares=selecting.proxy_shares(job),
        labels=job.labels(),
        out=out,
    )
