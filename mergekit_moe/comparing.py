"""`metamoe compare`: every method on every domain, over several random seeds, in one table.

The workspace holds what all seeds share (the seed model, the pool's embeddings); `seeds/S` what one of them made:
proxies, experts, `variants/NAME` where an ablation selects or aligns anew, and `methods/NAME`, a result each.
"""

import functools
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_moe import data, pipeline
from mergekit_moe.errors import RecipeError
from mergekit_moe.experts import read_proxies
from mergekit_moe.job import Job
from mergekit_moe.methods import ORACLE, Method, methods_of
from mergekit_moe.plan import plan
from mergekit_moe.recipe import ANCHOR, ExpertSource, Recipe, TrainedSeed
from mergekit_moe.recipe_file import change_recipe
from mergekit_moe.workspace import Workspace, process_state, read_json, write_json

if TYPE_CHECKING:
    from datasets import Dataset

    from mergekit_moe.evaluation.scoring import Domain, Predict
    from mergekit_moe.matching import Labels

COMPARISON = "comparison"
RESULT = "result.json"
_ALIGNING = ("alignment", "privacy")
"""Parts of a recipe that a client's expert depends on."""
_UNIFYING = ("public_pool", "data_dir", "seed", "merge", "router")
"""Parts that are all that who unifies published experts needs."""
_CHANGEABLE = {"selection", "alignment", "privacy", "merge", "router", "evaluation", "experts"}
"""Parts that an ablation may change; of experts only what judges them."""
_FOR_MOE = ("merge", "router", "export")
"""Parts that a recipe for one dense model can't have as they are."""


def compare(job: Job, *, only: Sequence[str] = (), seeds: Sequence[str] = ()) -> dict[str, Any]:
    """Run what isn't there yet, write the comparison, and return it.

    Args:
        only: names of the methods to run now, all if none is named; those that ran before stay in the table.
        seeds: random seeds to run now, the recipe's if none is named.

    Raises:
        MetaMoeError: for whatever a user can have got wrong.
    """
    _require_comparable(job.recipe)
    methods, chosen = _chosen(job.recipe, only), _numbers(seeds)
    jobs = list(_jobs_of_seeds(job, sorted({*job.recipe.comparison.seeds, *chosen})))
    if not job.clients:
        plan(jobs[0])  # nothing is made of these experts that would be looked at first
    for of_seed in jobs:
        if of_seed.recipe.seed not in (chosen or job.recipe.comparison.seeds):
            continue
        for command in ("select", "align", "publish") if of_seed.clients else ():
            pipeline.run(of_seed, command)
        for name, method in methods.items():
            if name != ORACLE:
                _measure_method(of_seed, name, method)
    return _write_comparison(job, jobs)


def _require_comparable(recipe: Recipe) -> None:
    """Raise RecipeError for what can't be put side by side, before any work."""
    if process_state().num_processes > 1:
        raise RecipeError("compare runs in one process; start it without `accelerate launch`")
    if recipe.merge.method != "moe":
        raise RecipeError(
            f"merge.method {recipe.merge.method}: compare has a row for it already, and its own are MoEs; drop it"
        )
    if not any(expert.client is not None or expert.test is not None for expert in recipe.experts):
        raise RecipeError("no expert has held-out rows to compare methods by; give 'test' to one")
    for expert in recipe.experts:
        if expert.proxies == "expert-gain":
            raise RecipeError(
                f"expert '{expert.name}': compare unifies what experts published, and this one published no proxies "
                "(`proxies: expert-gain`); leave it out"
            )


def _chosen(recipe: Recipe, only: Sequence[str]) -> dict[str, Method]:
    """Return the methods to run, all of whose changes make sense."""
    methods = methods_of(recipe)
    for name in only:
        if name not in methods:
            raise RecipeError(f"there is no method '{name}' to compare; there are {', '.join(methods)}")
    for name, method in methods.items():
        if method.group != "ablation":
            continue
        what = f"comparison.ablations.{name.removeprefix('ablation-')}"
        change_recipe(recipe, method.changes or {}, what)
        if "selection" in (method.changes or {}) and all(expert.client is None for expert in recipe.experts):
            raise RecipeError(f"{what}.selection: all experts brought their proxies, and nobody selects any; drop it")
        for part in (method.changes or {}).keys() - _CHANGEABLE:
            raise RecipeError(
                f"{what}.{part}: all methods share it; an ablation changes {', '.join(sorted(_CHANGEABLE))}"
            )
    return {name: method for name, method in methods.items() if not only or name in only}


def _numbers(seeds: Sequence[str]) -> list[int]:
    for seed in seeds:
        if not seed.isdecimal():
            raise RecipeError(f"--seeds: {seed!r} is no number; give random seeds such as 0,1,2")
    return [int(seed) for seed in seeds]


def _jobs_of_seeds(job: Job, seeds: list[int]) -> Iterator[Job]:
    """Yield a job a random seed; all start from one seed model, and what doesn't depend on chance is made once."""
    changes: dict[str, Any] = {}
    if isinstance(job.recipe.base_model, TrainedSeed):
        if not job.embeds_itself:
            pipeline.run(job, "select")
        pipeline.run(job, "seed")
        changes = {"base_model": str(job.base.folder.resolve())}
    lenders: tuple[Workspace, ...] = (job.workspace,)
    for seed in seeds:
        recipe = change_recipe(job.recipe, {**changes, "seed": seed}, "comparison.seeds")
        workspace = Workspace(job.workspace.folder(f"seeds/{seed}"), job.workspace.report, lenders)
        lenders = (*lenders, workspace)
        yield Job(recipe, job.name, workspace)


class _Measurement(NamedTuple):
    """What one method's result for one random seed is made from."""

    experts: Job
    """Whose experts are unified."""
    judged: Job
    """Of the recipe as the method changes it."""
    picked: dict[str, list[int]]
    """Each expert's proxies, as the pool's rows."""
    inputs: dict[str, Any]


def _measurement(job: Job, name: str, method: Method) -> _Measurement:
    """Return what a method's result is made from, once its experts and proxies are there."""
    changed = _changed(job.recipe, name, method)
    judged = Job(changed, job.name, job.workspace)
    variant = _variant(job, name, method)
    experts = variant if _aligns(method) else job
    picked = {source.name: _picked(experts, variant, source) for source in job.recipe.experts}
    tasks = [task.model_dump(mode="json") for expert in changed.experts if (task := expert.task)]
    inputs = {
        "method": [method.changes or {}, method.private and [job.recipe.comparison.ceiling_rows, "at random"]],
        "recipe": {key: getattr(changed, key).model_dump(mode="json") for key in _judging(changed, method)},
        **({"tasks": tasks} if tasks else {}),
        "base": job.base_identity,
        "experts": experts.expert_identities(),
        "proxies": list(picked.values()),
        "held_out": [judged.held_out_fingerprint(expert) for expert in changed.experts],
        "strangers": data.fingerprint(list(job.recipe.comparison.strangers.values()), job.data_dir, "strangers"),
        "seed": job.recipe.seed,
    }
    return _Measurement(experts, judged, picked, inputs)


def _measure_method(job: Job, name: str, method: Method) -> None:
    """Make the result of one method for one random seed."""
    if (variant := _variant(job, name, method)) is not job:
        for command in ("select", "align", "publish") if _aligns(method) else ("select",):
            pipeline.run(variant, command)
    given = _measurement(job, name, method)
    make = functools.partial(_measure, given.experts, given.judged, name, method, given.picked)
    job.workspace.build(f"methods/{name}", given.inputs, make)


def _changed(recipe: Recipe, name: str, method: Method) -> Recipe:
    """Return the recipe as a method changes it."""
    without = _FOR_MOE if method.dense else ()
    return change_recipe(recipe, method.changes or {}, f"comparison.{name}", without=without)


def _judging(recipe: Recipe, method: Method) -> tuple[str, ...]:
    """Return the parts of a recipe that change what a method is found to be worth."""
    merging = () if method.changes is None else ("merge",) if method.dense else ("merge", "router")
    return (*merging, "evaluation", *(["matching"] if recipe.matches_labels else []))


def _aligns(method: Method) -> bool:
    """Whether a method trains experts of its own."""
    return bool((method.changes or {}).keys() & set(_ALIGNING))


def _variant(job: Job, name: str, method: Method) -> Job:
    """Return a job whose proxies, and experts where asked for, are as a method wants them: the same where it is one."""
    changes = method.changes or {}
    parts = {part: value for part, value in changes.items() if part in (*_ALIGNING, "selection")}
    if not parts or not job.clients:
        return job
    folder = job.workspace.folder(f"variants/{name.removeprefix('ablation-')}")
    workspace = Workspace(folder, job.workspace.report, (job.workspace, *job.workspace.lenders))
    return Job(change_recipe(job.recipe, parts, f"comparison.{name}"), job.name, workspace)


def _picked(experts: Job, selecting: Job, source: ExpertSource) -> list[int]:
    """Return the pool's rows that are an expert's proxies."""
    if source.client is None and source.proxies == "published":
        expert = experts.expert(source)
        experts.proxy_rows(expert)  # are they of this pool?
        return experts.proxies(expert)["rows"]
    if selecting is experts:
        return experts.proxies(experts.expert(source))["rows"]
    return read_proxies(selecting.workspace.folder(f"proxies/{source.name}"), source.name)["rows"]


def _measure(experts: Job, judged: Job, name: str, method: Method, picked: dict[str, list[int]], out: Path) -> None:
    """Write what a method makes of each domain to the folder `out`."""
    from mergekit_moe.evaluation.scoring import Predict, by_model, measure, tokenized
    from mergekit_moe.models import load_model, load_reader

    settings, reader = judged.recipe.evaluation, load_reader(judged.base.folder)
    labels = (experts if judged.classifies else judged).labels()
    domains = tokenized(_domains(judged), reader, settings, labels.names if labels is not None else [])
    strangers = tokenized(_strangers(judged), reader, settings)
    if method.changes is None:
        predict, models = _unmerged(experts, name, labels)
        result = measure(predict, models, domains, strangers, settings)
    else:
        sub, seconds = _unify(experts, judged.recipe, method, picked, out / "work")
        model = load_model(sub.workspace.folder(sub.model), labels)
        result = measure(by_model(model), [model], domains, strangers, settings)
        result |= {"seconds": seconds, "trainable_parameters": _trained_parameters(sub, model)}
        shutil.rmtree(out / "work")
    if "experts" in (method.changes or {}):  # judged by other rows than the rest: it brings what to hold it against
        known: dict[str, tuple[Predict, list[Any]]] = {
            key: _unmerged(experts, key, labels) for key in ("seed", *(f"expert-{domain.name}" for domain in domains))
        }
        result["references"] = {key: measure(*made, domains, [], settings)["domains"] for key, made in known.items()}
    write_json(out / RESULT, result)


def _domains(job: Job) -> "list[Domain]":
    from mergekit_moe.evaluation.scoring import Domain

    held_out = [(number, source, job.rows(source)[1]) for number, source in enumerate(job.recipe.experts)]
    return [Domain(number, source.name, rows, source.task) for number, source, rows in held_out if rows is not None]


def _strangers(job: Job) -> "list[Domain]":
    from mergekit_moe.evaluation.scoring import Domain

    sources = job.recipe.comparison.strangers
    return [
        Domain(-1, name, data.load_rows([source], job.data_dir, f"comparison.strangers.{name}"))
        for name, source in sources.items()
    ]


def _unmerged(job: Job, name: str, labels: "Labels | None") -> "tuple[Predict, list[Any]]":
    """Return how a method predicts that merges nothing, and its models."""
    from mergekit_moe.evaluation.scoring import by_model, by_posterior, by_vote
    from mergekit_moe.models import load_expert, load_model

    if name == "seed":
        model = load_model(job.base.folder, labels)
        return by_model(model), [model]
    folders = {f"expert-{expert.name}": expert.folder for expert in job.experts()}
    votes = {"btm": by_vote, "btm-posterior": by_posterior}
    chosen = folders.values() if name in votes else [folders[name]]
    models = [load_expert(job.base.folder, folder, labels) for folder in chosen]
    return (votes[name](models) if name in votes else by_model(models[0])), models


def _unify(
    experts: Job, recipe: Recipe, method: Method, picked: dict[str, list[int]], work: Path
) -> tuple[Job, dict[str, float]]:
    """Unify published experts in the folder `work`, as who knows nothing else of them would; return the times, too."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    kept: dict[str, Any] = {key: values[key] for key in _UNIFYING if key in values}
    kept["base_model"] = str(experts.base.folder.resolve())
    kept["experts"] = [
        {"name": expert.name, "source": str(expert.folder.resolve()), "same_base": True} for expert in experts.experts()
    ]
    sub = Job(Recipe.model_validate(kept), experts.name, Workspace(work))
    for source in experts.recipe.experts:
        if method.private:
            rows = _some(experts.private_rows(source), recipe.comparison.ceiling_rows, recipe.seed)
            sub.use_proxies(source.name, rows)
        else:
            sub.use_proxies(source.name, experts.pool.select(picked[source.name]), picked[source.name])
    seconds = {}
    for part, command in {"merge": "merge", "router": "train-router"}.items():
        begun = time.perf_counter()
        if part == "merge" or sub.recipe.fits_routers:
            pipeline.run(sub, command)
        seconds[part] = time.perf_counter() - begun
    return sub, seconds


def _some(rows: "Dataset", count: int, seed: int) -> "Dataset":
    """Return so many rows picked at random: files are often sorted, and the first rows of a few kinds only."""
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), min(len(rows), count))))


def _trained_parameters(sub: Job, model: Any) -> int:
    """Return how many parameters a method trains to unify; a closed form trains none."""
    from mergekit_moe.routing.training import trainable

    training = sub.recipe.router.training
    if not sub.recipe.fits_routers or training is None:
        return 0
    return sum(parameter.numel() for parameter in trainable(model, training).values())


def _is_of_this_recipe(job: Job, name: str, method: Method, *, published: bool) -> bool:
    """Whether a result is there, and from what the recipe and its data are now; else it is told.

    Args:
        published: whether the experts are.
    """
    stage = f"methods/{name}"
    if not (job.workspace.folder(stage) / RESULT).is_file():
        return False
    variant = _variant(job, name, method)
    made = published and (variant is job or pipeline.is_current(variant, "publish" if _aligns(method) else "select"))
    if made and job.workspace.is_current(stage, _measurement(job, name, method).inputs):
        return True
    job.workspace.report(f"{name}, random seed {job.recipe.seed}: of an older recipe, left out; run it again")
    return False


def _write_comparison(job: Job, jobs: list[Job]) -> dict[str, Any]:
    """Put all results that are there together, as JSON, as Markdown and as pictures."""
    from mergekit_moe.evaluation.comparison import assemble, write_tables
    from mergekit_moe.evaluation.figures import write_figures

    published = [of_seed for of_seed in jobs if pipeline.is_current(of_seed, "publish")]
    found = {
        name: {
            "label": method.label,
            "group": method.group,
            "private": method.private,
            "seeds": {
                str(of_seed.recipe.seed): read_json(of_seed.workspace.folder(f"methods/{name}") / RESULT)
                for of_seed in jobs
                if _is_of_this_recipe(of_seed, name, method, published=of_seed in published)
            },
        }
        for name, method in methods_of(job.recipe).items()
    }
    names = [expert.name for expert in job.recipe.experts]
    comparison = assemble(found, names + ([ANCHOR] if job.recipe.merge.anchor else []))
    out = job.workspace.folder(COMPARISON)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "comparison.json", comparison)
    write_tables(comparison, out)
    write_figures(comparison, out)
    return comparison
