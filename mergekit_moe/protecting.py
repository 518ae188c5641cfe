"""Privacy at work on a recipe: noised statistics, what a client's stages spent, the ledger of what it publishes."""

from pathlib import Path
from typing import Any

from mergekit_moe import data
from mergekit_moe.experts import STATISTICS
from mergekit_moe.job import Job
from mergekit_moe.privacy.accounting import MECHANISM, Mechanism
from mergekit_moe.privacy.ledger import CARD, LEDGER, build_ledger, write_ledger
from mergekit_moe.privacy_recipe import proxies_depend
from mergekit_moe.recipe import ExpertSource
from mergekit_moe.workspace import MANIFEST, read_json, write_json

_STAGES = {"relevance": "proxies", "expert": "aligned", "statistics": "statistics"}
"""Key of the recipe's `privacy` -> the stage that spends on it."""
_REFERENCE_ROWS = 500
"""Public rows that the mean and the clip of noised statistics are taken from."""


def asked(job: Job, client: ExpertSource, part: str) -> list[Any] | None:
    """Return what a recipe asks of one mechanism, as a stage's inputs name it; None where it is off."""
    privacy = job.recipe.privacy_of(client)
    settings = getattr(privacy, part)
    on = settings is not None and (part != "statistics" or settings.private)
    return [settings.model_dump(mode="json"), privacy.delta] if on else None


def spent_by(job: Job, client: ExpertSource) -> dict[str, Mechanism]:
    """Return the mechanisms that a client's stages really applied."""
    spent = {}
    for part, stage in _STAGES.items():
        if asked(job, client, part) is not None:
            spent[part] = Mechanism(**read_json(job.workspace.folder(f"{stage}/{client.name}") / MECHANISM))
    return spent


def statistics_file(job: Job, client: ExpertSource) -> Path | None:
    """Return where a client's noised routing statistics lie, None where it has none."""
    if asked(job, client, "statistics") is None:
        return None
    return job.workspace.folder(f"statistics/{client.name}") / STATISTICS


def noised_statistics_of(job: Job, client: ExpertSource, out: Path) -> None:
    """Write a client's noised routing statistics; what they were summed from stays nowhere."""
    import random

    from safetensors.torch import save_file

    from mergekit_moe.alignment import domain_free_tokens
    from mergekit_moe.models import load_model, load_reader
    from mergekit_moe.privacy.statistics import private_statistics, public_reference, text_vectors

    privacy, rows = job.recipe.privacy_of(client), job.private_rows(client)
    assert privacy.statistics.epsilon is not None
    model, reader = load_model(job.base.folder).eval(), load_reader(job.base.folder)
    silent = domain_free_tokens(reader, job.recipe.alignment)

    def vectors(texts: Any) -> Any:
        return text_vectors(model, data.tokenize(texts, reader, job.recipe.router.max_length), silent)

    some = random.Random(job.recipe.seed).sample(range(len(job.pool)), min(len(job.pool), _REFERENCE_ROWS))
    mean, norm = public_reference(vectors(job.pool.select(sorted(some))))
    statistics, spent = private_statistics(
        vectors(rows),
        len(rows),
        mean,
        clip=privacy.statistics.clip or norm,
        epsilon=privacy.statistics.epsilon,
        delta=privacy.delta,
        name=client.name,
    )
    save_file(statistics, str(out / STATISTICS))
    write_json(out / MECHANISM, spent._asdict())


def ledger_of(job: Job, client: ExpertSource, out: Path) -> dict[str, Any]:
    """Write the ledger of the folder `out`: of its files, itself, and the manifest and card to come; return it."""
    privacy = job.recipe.privacy_of(client)
    ledger = build_ledger(
        sorted({path.name for path in out.iterdir()} | {LEDGER, MANIFEST, CARD}),
        spent_by(job, client),
        delta=privacy.delta,
        proxies_depend=proxies_depend(job.recipe),
        expert_on_proxies=job.recipe.alignment.proxies,
        private_statistics=privacy.statistics.private,
        learns_labels=job.recipe.matches_labels,
        labelled=job.classifies,
    )
    write_ledger(out, ledger)
    return ledger
