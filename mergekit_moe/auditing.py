"""`metamoe audit`: membership tests against what a client would publish, beside what its ledger promises.

Of the folder that is there, the client's own rows against its held-out ones. And the client's stages are run once more,
in a folder that goes away, with canaries planted among the private rows: made-up texts, of which as many are left out.
All of it stays with the client; what is written holds numbers and no text.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_moe import data, protecting, selecting
from mergekit_moe.errors import PrivacyError
from mergekit_moe.experts import STATISTICS, read_proxies
from mergekit_moe.image_recipe import is_of_images
from mergekit_moe.job import Job
from mergekit_moe.pipeline import align_client, publish_client, require_current
from mergekit_moe.plan import plan
from mergekit_moe.privacy.attacks import canaries, membership, most_allowed, tracing_scores
from mergekit_moe.privacy.ledger import DP, LEDGER
from mergekit_moe.recipe import ExpertSource
from mergekit_moe.workspace import Workspace, read_json, write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

AUDIT = "audit.json"
_SHARED = ("embeddings", "seed")
_MOST_TEXTS = 500
_MOST_CANARIES = 100
_FEWEST = 10


class _Beside(Workspace):
    """A workspace of a client's stages that reads what is not a client's from another."""

    def __init__(self, root: Path, beside: Workspace) -> None:
        super().__init__(root)
        self.beside = beside

    def folder(self, name: str) -> Path:
        return self.beside.folder(name) if name in _SHARED else super().folder(name)


def audit(job: Job) -> dict[str, Any]:
    """Attack what every client of the recipe would publish; write `audit/audit.json` and return what is in it.

    Raises:
        WorkspaceError: if a client's folder hasn't been published yet, or is out of date.
        PrivacyError: if the recipe has no client, or its rows are images.
    """
    if not job.clients:
        raise PrivacyError("this recipe has no client, and an audit needs private rows; give an expert a 'client'")
    if is_of_images(job.recipe):
        raise PrivacyError("metamoe audit plants made-up texts among a client's, and here rows are images: it can't")
    plan(job, merging=False)
    require_current(job, "publish")
    report: dict[str, Any] = {}

    def make(out: Path) -> None:
        for client in job.clients:
            job.workspace.report(f"audit: {client.name}")
            report[client.name] = _audit_client(job, client)
        write_json(out / AUDIT, report)

    published = {c.name: job.workspace.digest_of(f"experts/{c.name}", "publish") for c in job.clients}
    judged = {c.name: [job.private_fingerprint(c), job.held_out_fingerprint(c)] for c in job.clients}
    inputs = {"experts": published, "rows": judged, "seed": job.recipe.seed}
    folder = job.workspace.build("audit", inputs, make)
    return report or read_json(folder / AUDIT)


def _audit_client(job: Job, client: ExpertSource) -> dict[str, Any]:
    private, held_out = job.rows(client)
    assert private is not None and held_out is not None
    published = job.workspace.folder(f"experts/{client.name}")
    ledger = read_json(published / LEDGER)
    tests = _attack(job, client, published, _some(private, job.recipe.seed), _some(held_out, job.recipe.seed), "rows")
    with tempfile.TemporaryDirectory() as scratch:
        planted, members, others = _plant(job, client, Path(scratch))
        tests += _attack(
            planted, client, planted.workspace.folder(f"experts/{client.name}"), members, others, "canaries"
        )
    total = ledger["total"]
    allowed = most_allowed(total["epsilon"], total["delta"]) if total["guarantee"] == DP else None
    return {"ledger": ledger, "tests": tests, "tpr_that_the_total_allows": allowed}


def _some(rows: "Dataset", seed: int) -> "Dataset":
    return rows.shuffle(seed=seed).select(range(min(len(rows), _MOST_TEXTS)))


def _plant(job: Job, client: ExpertSource, scratch: Path) -> tuple[Job, "Dataset", "Dataset"]:
    """Run a client's stages with canaries among its rows; return the job, those canaries and the ones left out."""
    from datasets import concatenate_datasets

    private, held_out = job.rows(client)
    assert private is not None
    count = max(_FEWEST, min(_MOST_CANARIES, len(private) // 5))
    words = " ".join(data.Texts(job.pool)[: 10 * _MOST_TEXTS]).split()
    names = data.label_names(private) or [""]
    made = [
        {"id": f"canary-{i}", "prompt": "", "completion": text, "tag": "", "label": names[i % len(names)]}
        for i, text in enumerate(canaries(words, 2 * count, job.recipe.seed))
    ]
    rows = private.from_list(made, features=private.features)
    members, others = rows.select(range(count)), rows.select(range(count, 2 * count))
    planted = Job(job.recipe, job.name, _Beside(scratch, job.workspace))
    planted.use_rows(client, concatenate_datasets([private, members]), held_out)
    for stage, make in (
        ("proxies", selecting.select_for_client),
        ("aligned", align_client),
        ("statistics", protecting.noised_statistics_of),
        ("experts", publish_client),
    ):
        if stage != "statistics" or protecting.asked(job, client, "statistics") is not None:
            out = planted.workspace.folder(f"{stage}/{client.name}")
            out.mkdir(parents=True)
            make(planted, client, out)
    return planted, members, others


def _attack(
    job: Job, client: ExpertSource, published: Path, members: "Dataset", others: "Dataset", kind: str
) -> list[dict[str, Any]]:
    """Return both tests' results for texts of a kind."""
    import torch

    from mergekit_moe.models import load_expert, load_labels, load_model, load_tokenizer, read_statistics
    from mergekit_moe.privacy.statistics import text_vectors

    names, tokenizer = data.label_names(job.private_rows(client)), load_tokenizer(job.base.folder)
    labels = load_labels(job.base.folder, names, job.recipe.matching.temperature)
    base, expert = load_model(job.base.folder, labels).eval(), load_expert(job.base.folder, published, labels).eval()
    settings = job.recipe.alignment
    losses = []
    for rows in (members, others):
        tokens = data.tokenize(rows, tokenizer, settings.max_length, names)
        losses.append((_losses(base, tokens) - _losses(expert, tokens)).tolist())
    silent = read_json(published / "expert.json")["domain_free_token_ids"]

    def vectors(rows: "Dataset") -> Any:
        return text_vectors(base, data.tokenize(rows, tokenizer, job.recipe.router.max_length), silent)

    statistics = read_statistics(published / STATISTICS)
    proxies = read_proxies(published, published.name)["rows"]
    known: dict[str, Any] = {
        "mean_LH": statistics["sum"] / statistics["count"],
        "noise_L": statistics["noise"],
        # Who attacks may know how many texts there are; statistics over proxies count tokens, and tell that not.
        "texts": len(job.private_rows(client)),
        "centre_LH": torch.cat(list(vectors(job.pool.select(proxies)))).mean(0),
        "spread_MLH": torch.cat(list(vectors(_some(job.pool, job.recipe.seed)))),
    }
    traced = [tracing_scores(torch.cat(list(vectors(rows))), **known).tolist() for rows in (members, others)]
    return [
        {"texts": kind, "test": "loss under the adapter against the base", **membership(*losses)},
        {"texts": kind, "test": "tracing on the routing statistics", **membership(*traced)},
    ]


def _losses(model: Any, tokens: "Dataset") -> "Tensor":
    """Return (N,) each text's mean loss, nats a token."""
    import torch

    from mergekit_moe.privacy.training import row_losses

    with torch.no_grad():
        return torch.cat([row_losses(model, batch).cpu() for batch in data.batches(tokens, 16, model.device)])
