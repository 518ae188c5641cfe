"""The stages of selection at work on a recipe: embed the pool, pick proxies for clients and for foreign experts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_moe import data
from mergekit_moe.experts import PROXIES, Expert
from mergekit_moe.job import POOL, Job
from mergekit_moe.privacy.accounting import MECHANISM
from mergekit_moe.recipe import ExpertSource
from mergekit_moe.workspace import read_json, wait_for_everyone, write_json

if TYPE_CHECKING:
    from mergekit_moe.selection.proxies import ProxySelection

_AT_ONCE = 4096
"""Pool rows that are compared with private ones at a time."""
SELECTION = "selection.json"
"""A client's own report on its proxies; it stays with the client."""


def embed_pool_of(job: Job, out: Path) -> None:
    """Embed the pool."""
    from mergekit_moe.selection.processes import Processes
    from mergekit_moe.selection.store import embed_pool, embedding_report

    embedder, processes = job.loaded_embedder, Processes.of_launch()
    dtype = job.recipe.selection.embedding_dtype
    embed_pool(embedder, data.Texts(job.pool), out, dtype=dtype, processes=processes, wait=wait_for_everyone)
    report = embedding_report(out)
    if report["too_long"]:
        job.workspace.report(
            f"note: {report['too_long']:,} of {report['distinct']:,} pool texts are longer than the "
            f"{embedder.max_seq_length} tokens that the embedder reads; they are judged by their beginning"
        )


def select_for_client(job: Job, client: ExpertSource, out: Path) -> None:
    """Pick a client's proxies."""
    from mergekit_moe.selection.processes import Processes
    from mergekit_moe.selection.proxies import select_proxies
    from mergekit_moe.selection.store import load_embeddings, repeated_rows

    processes = Processes.of_launch()
    embeddings = job.workspace.folder("embeddings")
    # One process embeds the client's texts: all go on from the same numbers.
    client_texts = processes.from_first(_embed_client(job, client) if processes.rank == 0 else None)
    chosen = select_proxies(
        load_embeddings(embeddings),
        client_texts["private"],
        job.recipe.selection,
        name=client.name,
        seed=job.recipe.seed,
        prompts_PD=client_texts["prompts"],
        copies_N=client_texts["copies"],
        repeated_N=repeated_rows(embeddings),
        privacy=job.recipe.privacy_of(client),
        processes=processes,
    )
    if processes.rank == 0:
        _write_selection(job, client, chosen, client_texts["held_out"], out)


def _embed_client(job: Job, client: ExpertSource) -> dict[str, Any]:
    """Return what the selection and its diagnostics need of a client's texts: embeddings, never the texts."""
    import numpy as np

    from mergekit_moe.selection.embedding import embed, sample_texts, too_long

    settings, seed, embedder = job.recipe.selection, job.recipe.seed, job.loaded_embedder
    private = data.texts_of(job.private_rows(client))
    # A sample by a known seed would tell apart who is in it: noised relevance goes by all texts.
    whole = job.recipe.privacy_of(client).relevance is not None
    sample = private if whole else sample_texts(private, settings.private_samples, seed)
    if longer := too_long(embedder, sample):
        job.workspace.report(
            f"note: expert '{client.name}': {longer:,} of {len(sample):,} private texts are longer than the "
            f"{embedder.max_seq_length} tokens that the embedder reads; they are judged by their beginning"
        )
    copies = None
    if settings.duplicate_cosine is not None:
        known = set(private)
        public = data.Texts(job.pool)
        parts = (public[at : at + _AT_ONCE] for at in range(0, len(public), _AT_ONCE))
        copies = np.array([text in known for part in parts for text in part])
    held_out = job.rows(client)[1]
    judges = [] if held_out is None else sample_texts(data.texts_of(held_out), settings.private_samples, seed)
    prompts = client.client.prompts if client.client is not None else []
    return {
        "private": embed(embedder, sample),
        "prompts": embed(embedder, prompts) if prompts else None,
        "held_out": embed(embedder, judges) if len(judges) > 1 else None,
        "copies": copies,
    }


def _write_selection(job: Job, client: ExpertSource, chosen: "ProxySelection", held_out: Any, out: Path) -> None:
    from mergekit_moe.selection.diagnostics import write_diagnostics
    from mergekit_moe.selection.proxies import tag_shares
    from mergekit_moe.selection.store import load_embeddings

    rows, seed = chosen.rows.tolist(), job.recipe.seed
    settings = job.recipe.selection.model_copy(update={"budget": len(rows)})
    pool_vectors = load_embeddings(job.workspace.folder("embeddings"))
    report = {**chosen.report, "relevance": [round(float(r), 6) for r in chosen.relevance[rows]]}
    if client.client is not None and client.client.tag is not None:
        report["tag_shares"] = tag_shares(
            chosen.rows, job.pool["tag"][:], client.client.tag, chosen.relevance, pool_vectors, settings, seed
        )
    for warning in chosen.report["warnings"]:
        job.workspace.report(f"warning: expert '{client.name}': {warning}")
    if held_out is not None:
        public = job.pool["id"] if data.has_images(job.pool) else data.Texts(job.pool)
        write_diagnostics(
            pool_vectors,
            chosen.rows,
            chosen.relevance,
            held_out,
            public,
            gains_K=chosen.gains,
            draw_private=settings.draw_private,
            seed=seed,
            out=out,
        )
    _write_proxies(job, rows, out)
    write_json(out / SELECTION, report)
    if chosen.spent is not None:
        write_json(out / MECHANISM, chosen.spent._asdict())


def _write_proxies(job: Job, rows: list[int], out: Path) -> None:
    proxies = {
        "pool": {
            "fingerprint": job.pool_fingerprint,
            "sources": [data.describe(source, job.data_dir, POOL) for source in job.recipe.pool_sources],
            "rows": len(job.pool),
        },
        "rows": rows,
        "ids": job.pool.select(rows)["id"][:],
    }
    write_json(out / PROXIES, proxies)


def proxy_shares(job: Job) -> dict[str, dict[str, float]]:
    """Return, for each client whose tag is known, the share of its proxies that carry it, by method."""
    reports = {c.name: read_json(job.workspace.folder(f"proxies/{c.name}") / SELECTION) for c in job.clients}
    return {name: report["tag_shares"] for name, report in reports.items() if "tag_shares" in report}


def measure_gains(job: Job, expert: Expert, out: Path) -> None:
    """Measure how much better a foreign expert reads the pool's texts than the base model does."""
    from mergekit_moe.selection.expert_gain import write_expert_gains
    from mergekit_moe.selection.processes import Processes

    write_expert_gains(
        job.base.folder,
        expert.folder,
        data.Texts(job.pool),
        out,
        max_length=job.recipe.router.max_length,
        processes=Processes.of_launch(),
        wait=wait_for_everyone,
    )


def select_for_foreign(job: Job, expert: ExpertSource, out: Path) -> None:
    """Pick a foreign expert's proxies, by its gains."""
    from mergekit_moe.selection.expert_gain import gain_relevance, load_gains
    from mergekit_moe.selection.processes import Processes
    from mergekit_moe.selection.proxies import pick_by_relevance
    from mergekit_moe.selection.store import load_embeddings, repeated_rows

    processes, embeddings = Processes.of_launch(), job.workspace.folder("embeddings")
    chosen = pick_by_relevance(
        load_embeddings(embeddings),
        gain_relevance(load_gains(job.workspace.folder(f"gains/{expert.name}"))),
        job.recipe.selection,
        name=expert.name,
        seed=job.recipe.seed,
        repeated_N=repeated_rows(embeddings),
        processes=processes,
    )
    if processes.rank == 0:
        _write_proxies(job, chosen.rows.tolist(), out)
        write_json(out / SELECTION, chosen.report)
