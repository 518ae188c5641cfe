"""The `metamoe` command: one subcommand a stage; those on a recipe share their arguments. Imports nothing heavy."""

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mergekit_moe import __version__
from mergekit_moe.errors import HarnessError, MetaMoeError
from mergekit_moe.workspace import leave_processes

if TYPE_CHECKING:
    from mergekit_moe.pipeline import Job

app = typer.Typer(
    name="metamoe",
    help="Unify experts that were trained apart into one Mixture-of-Experts model that loads with AutoModel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
WorkspacePath = Annotated[
    Path | None, typer.Option("--workspace", help="Folder for all results; runs/<recipe name> if not given.")
]
DataPath = Annotated[
    Path | None, typer.Option("--data-dir", help="Where relative data paths start; wins over the recipe's data_dir.")
]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Unify experts that were trained apart into one Mixture-of-Experts model that loads with AutoModel."""
    if show:
        console.print(f"metamoe {__version__}")
        raise typer.Exit


@app.command()
def check(recipe: RecipePath, workspace: WorkspacePath = None, data_dir: DataPath = None) -> None:
    """Print the plan and every problem that rows, files and headers show; reads no weight, starts no work."""
    from mergekit_moe.pipeline import plan

    table = Table(show_header=False, box=None)
    job = _job(recipe, workspace, data_dir)
    alone = len(job.recipe.experts) == len(job.clients) == 1  # a client's own recipe: nothing is merged there
    for name, what in plan(job, merging=not alone, carding=job.recipe.merge.method == "moe" and not alone):
        table.add_row(name, what)
    console.print(table)


@app.command()
def run(recipe: RecipePath, workspace: WorkspacePath = None, data_dir: DataPath = None) -> None:
    """Walk the whole line: select, seed, align, publish, merge, train-router, evaluate, card, export."""
    _run(recipe, workspace, data_dir, None)


@app.command()
def select(recipe: RecipePath, workspace: WorkspacePath = None, data_dir: DataPath = None) -> None:
    """Pick each client's proxies from the public pool."""
    _run(recipe, workspace, data_dir, "select")


@app.command()
def seed(recipe: RecipePath, workspace: WorkspacePath = None, data_dir: DataPath = None) -> None:
    """Train the small seed model that the recipe describes, where it names none."""
    _run(recipe, workspace, data_dir, "seed")


@app.command()
def align(recipe: RecipePath, workspace: WorkspacePath = None, data_dir: DataPath = None) -> None:
    """Train each client's expert on its private rows and its proxies."""
    _run(recipe, workspace, data_dir, "align")


@app.command()
def publish(recipe: RecipePath, workspace: WorkspacePath = None, data_dir: DataPath = None) -> None:
    """Assemble the folder that each client may publish; nothing leaves this machine."""
    _run(recipe, workspace, data_dir, "publish")


@app.command()
def audit(recipe: RecipePath, workspace: WorkspacePath = None, data_dir: DataPath = None) -> None:
    """Try to tell, from what each client would publish, which texts it learnt from; prints that beside its ledger."""
    from transformers.utils import logging

    from mergekit_moe.auditing import audit

    logging.disable_progress_bar()
    job = _job(recipe, workspace, data_dir)
    for name, found in audit(job).items():
        _print_audit(name, found)
    console.print(f"audit: {job.workspace.folder('audit')}", highlight=False, soft_wrap=True)


def _print_audit(name: str, found: dict[str, Any]) -> None:
    from mergekit_moe.privacy.ledger import guarantee_in_words

    ledger = Table(title=f"{name}: what it publishes", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("file", "can reveal", "guarantee"):
        ledger.add_column(title)
    for entry in found["ledger"]["artifacts"]:
        ledger.add_row(entry["file"], entry["can_reveal"], guarantee_in_words(entry))
    ledger.add_row("all together", "", guarantee_in_words(found["ledger"]["total"]))
    console.print(ledger)
    tests = Table(title=f"{name}: membership tests", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("texts", "test", "AUC", "TPR at 1% FPR", "members", "others"):
        tests.add_column(title, justify="left" if title in ("texts", "test") else "right")
    for test in found["tests"]:
        rates = (f"{test['auc']:.3f}", f"{test['tpr_at_1pct_fpr']:.3f}", str(test["members"]), str(test["others"]))
        tests.add_row(test["texts"], test["test"], *rates)
    console.print(tests)
    allowed = found["tpr_that_the_total_allows"]
    if allowed is not None:
        console.print(f"TPR at 1% FPR that the ledger's total allows at most: {allowed:.3f}", highlight=False)


@app.command()
def merge(recipe: RecipePath, workspace: WorkspacePath = None, data_dir: DataPath = None) -> None:
    """Join the base and all experts into one MoE checkpoint; routers are blank where a pool is there to fit them on."""
    _run(recipe, workspace, data_dir, "merge")


@app.command(name="train-router")
def train_router(recipe: RecipePath, workspace: WorkspacePath = None, data_dir: DataPath = None) -> None:
    """Fit the routers on the proxies, in closed form, and train them on where the recipe says so."""
    _run(recipe, workspace, data_dir, "train-router")


@app.command()
def compare(
    recipe: RecipePath,
    workspace: WorkspacePath = None,
    data_dir: DataPath = None,
    only: Annotated[
        str,
        typer.Option(
            "--only", help="Methods to run now, commas between; all if not given. Retention needs seed and expert-NAME."
        ),
    ] = "",
    seeds: Annotated[str, typer.Option("--seeds", help="Random seeds to run now; the recipe's if not given.")] = "",
) -> None:
    """Put every method side by side on every domain, over several random seeds: tables, pictures and JSON."""
    from transformers.utils import logging

    from mergekit_moe.comparing import COMPARISON, compare
    from mergekit_moe.evaluation.comparison import GROUPS, TABLE, comparison_rows, for_a_terminal

    logging.disable_progress_bar()
    job = _job(recipe, workspace, data_dir)
    found = compare(job, only=_listed(only), seeds=_listed(seeds))
    for title, groups in GROUPS.items():
        _print_table(title, *for_a_terminal(*comparison_rows(found, groups)))
    whole = job.workspace.folder(COMPARISON) / TABLE
    console.print(f"with each domain, in JSON and in pictures: {whole}", highlight=False, soft_wrap=True)


@app.command()
def evaluate(recipe: RecipePath, workspace: WorkspacePath = None, data_dir: DataPath = None) -> None:
    """Judge seed, experts, soup and the unified model on held-out text."""
    _run(recipe, workspace, data_dir, "evaluate")


@app.command()
def card(recipe: RecipePath, workspace: WorkspacePath = None, data_dir: DataPath = None) -> None:
    """Write the unified model's card."""
    _run(recipe, workspace, data_dir, "card")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The unified model's folder.")],
    target: Annotated[str, typer.Option("--format", help="mixtral, qwen3_moe, qwen2_moe or flex_olmo.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    proxies: Annotated[
        Path | None, typer.Option("--proxies", help="Rows with `text` and `expert` (a name), to fit plain gates on.")
    ] = None,
) -> None:
    """Write a unified model as a native MoE family that loads without remote code."""
    from transformers.utils import logging

    from mergekit_moe.exporting import export_model, proxies_from_file

    logging.disable_progress_bar()
    rows = None if proxies is None else proxies_from_file(proxies, folder)
    report = export_model(folder, target, out, rows)
    if report["loss"] is not None:
        shares, losses = report["routing_agreement"], report["loss"]
        console.print(
            f"routing agreement {shares['mean']:.3f}, loss {losses['unified']:.4f} -> {losses['export']:.4f}",
            highlight=False,
        )
    console.print(f"model: {out}", highlight=False)


ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A unified model's folder.")]
OutPath = Annotated[Path, typer.Option("--out", help="The folder to make.")]
ProxiesPath = Annotated[
    Path | None, typer.Option("--proxies", help="Rows with `text` and `expert` (a name), to fit the routers on anew.")
]


@app.command(name="add-expert")
def add_expert(
    model: ModelPath,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The expert's folder or Hub id.")],
    name: Annotated[str, typer.Option("--name", help="The expert's name in the model.")],
    out: OutPath,
    proxies: ProxiesPath = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Of a Hub repository.")] = None,
    same_base: Annotated[
        bool, typer.Option("--same-base", help="The base that the expert names is the model's, by another name.")
    ] = False,
) -> None:
    """Write a unified model with one more expert; the others stay as they are."""
    from mergekit_moe.members import add_expert

    settings = {"name": name, "revision": revision, "same_base": same_base, "proxies": proxies}
    add_expert(model, source, out, **settings, tell=_tell)  # type: ignore[arg-type]
    console.print(f"model: {out}", highlight=False)


@app.command(name="drop-expert")
def drop_expert(
    model: ModelPath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The expert's name in the model.")],
    out: OutPath,
    proxies: ProxiesPath = None,
) -> None:
    """Write a unified model without one of its experts; `--proxies` fits routers anew that were fitted on proxies."""
    from mergekit_moe.members import drop_expert

    drop_expert(model, name, out, proxies=proxies, tell=_tell)
    console.print(f"model: {out}", highlight=False)


@app.command()
def inspect(
    model: ModelPath, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False
) -> None:
    """Show what is inside a unified model: experts, ranks, router norms, sources, licences."""
    import json

    from mergekit_moe.members import inspect_model

    found = inspect_model(model)
    if as_json:
        console.print_json(json.dumps(found))
        return
    base = found["base_model"]
    at = f" at {base['revision'][:7]}" if base["revision"] else ""
    router = found["router"]
    added = ", layers added up" if router["adds_layers"] else ""
    console.print(
        f"{found['model_type']}, base {base['source']}{at}, {found['bytes'] / 1e6:,.1f} MB; top-{found['top_k']}, "
        f"router {router['start']}, context {router['context']}{added}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("expert", "source", "licence", "kept as", "ranks", "MB", "router norm"):
        table.add_column(title, justify="right" if title in ("MB", "router norm") else "left")
    for expert in found["experts"]:
        at = f"@{expert['revision'][:7]}" if expert["revision"] else ""
        cells = [expert["name"], f"{expert['source']}{at}", expert["license"] or "unknown", expert["kept"]]
        ranks = expert["ranks"] or {}
        cells.append(", ".join(f"{name} {_spread(rank)}" for name, rank in ranks.items()) or "-")
        table.add_row(*map(_escaped, cells), f"{expert['bytes'] / 1e6:,.1f}", f"{expert['router_norm']:.3g}")
    console.print(table)


@app.command()
def harness(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model's folder.")],
    tasks: Annotated[str, typer.Option("--tasks", help="Names of tasks or groups, with commas between.")],
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="A folder with more tasks, in the harness's YAML.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows a task, the first ones.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 16,
    out: Annotated[Path | None, typer.Option("--out", help="A JSON file for the results.")] = None,
) -> None:
    """Judge a model by tasks of EleutherAI's lm-evaluation-harness, by its own code (the extra `harness`)."""
    from mergekit_moe.harness import metric_rows, run_harness
    from mergekit_moe.workspace import write_json

    if out is not None and not out.parent.is_dir():
        raise HarnessError(f"--out: there is no folder {out.parent}; make it first")
    found = run_harness(model, _listed(tasks), include_path=include_path, limit=limit, batch_size=batch_size)
    _print_table(found["model"], *metric_rows(found))
    if out is not None:
        write_json(out, found)
        _tell(f"results: {out}")


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="experts/<name>, proxy-sets/<name>, a unified model, or an export.")
    ],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="org/name on the Hub; made if it isn't there.")],
    public: Annotated[bool, typer.Option("--public", help="Let anybody see it; private if not given.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and their sizes, upload nothing.")] = False,
    message: Annotated[str | None, typer.Option("--message", help="The commit's.")] = None,
) -> None:
    """Upload a folder that metamoe made to the Hub, in one commit."""
    from mergekit_moe import pushing

    if dry_run:
        kind, files = pushing.files_to_push(folder, _tell)
        table = Table("file", "bytes", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.columns[1].justify = "right"
        for name, path in files.items():
            table.add_row(_escaped(name), f"{path.stat().st_size:,}")
        console.print(table)
        seen = "public" if public else "private"
        total = sum(path.stat().st_size for path in files.values())
        _tell(f"{kind} for {repository}, {seen}: {len(files)} files, {total:,} bytes; nothing was uploaded")
        return
    pushed = pushing.push(folder, repository, public=public, message=message, tell=_tell)
    _tell(f"{pushed.url} {'' if pushed.is_new else '(up to date: no new commit)'}".rstrip())
    _tell(f"commit: {pushed.sha}")


@app.command()
def find(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model's Hub id.")],
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many repositories to look at.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List experts on the Hub for a base model, each confirmed by its configs and headers; fetches no weights."""
    import json

    from mergekit_moe.finding import find_experts

    sha, found = find_experts(base, limit=limit)
    if as_json:
        experts = [expert._asdict() for expert in found]
        console.print_json(json.dumps({"base_model": {"source": base, "revision": sha}, "experts": experts}))
        return
    _tell(f"{base} at {sha[:7]}: {len(found)} repositories say that they were made from it")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("source", "kind", "proxies", "licence", "sha", "downloads"):
        table.add_column(title, justify="right" if title == "downloads" else "left")
    for expert in found:
        kind = expert.kind or "can't be merged"
        cells = [expert.source, kind, "yes" if expert.proxies else "no", expert.license or "unknown"]
        table.add_row(*map(_escaped, cells), (expert.sha or "unknown")[:7], f"{expert.downloads:,}")
    console.print(table)
    for expert in found:
        if expert.problem:
            _tell(f"{expert.source}: {expert.problem}")


def _spread(rank: int | list[int]) -> str:
    """Return a rank, or the least and the largest of the layers'."""
    return str(rank) if isinstance(rank, int) else f"{min(rank)}-{max(rank)}"


def _tell(line: str) -> None:
    console.print(_escaped(line), highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; a user's error is one sentence on stderr and exit code 2."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # of what is tried again: addresses of storage are signed
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # PEFT's call, not the user's: nothing that they could do about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        app()
    except MetaMoeError as error:
        for line in str(error).splitlines():
            errors.print(f"[bold red]error:[/] {_escaped(line)}", soft_wrap=True, highlight=False)
        sys.exit(2)
    finally:
        leave_processes()


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _job(recipe: Path, workspace: Path | None, data_dir: Path | None) -> "Job":
    from mergekit_moe.pipeline import Job
    from mergekit_moe.recipe_file import load_recipe
    from mergekit_moe.workspace import Workspace, is_main_process

    def report(line: str) -> None:
        if is_main_process():
            style = "bold" if line.endswith("building") else ""
            console.print(_escaped(line), style=style, highlight=False, soft_wrap=True)

    loaded = load_recipe(recipe, data_dir)
    return Job(loaded, recipe.stem, Workspace(workspace or Path("runs") / recipe.stem, report))


def _run(recipe: Path, workspace: Path | None, data_dir: Path | None, only: str | None) -> None:
    from mergekit_moe.pipeline import run
    from mergekit_moe.workspace import is_main_process

    if only != "merge":  # which needs no transformers, and is done in the time that its import takes
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading and saving, which take moments; training keeps its own
    job = _job(recipe, workspace, data_dir)
    run(job, only)
    if not is_main_process():
        return
    if only in (None, "evaluate") and job.evaluates:
        _print_results(job)
    if only in (None, "evaluate", "merge", "train-router"):
        model = "merged" if only == "merge" else job.model
        console.print(f"model: {job.workspace.folder(model)}", highlight=False, soft_wrap=True)


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(cell.replace("*", "") for cell in row))
    console.print(table)


def _print_results(job: "Job") -> None:
    from mergekit_moe.evaluation import tables
    from mergekit_moe.workspace import read_json

    results = read_json(job.workspace.folder("evaluation") / tables.RESULTS)
    for title, (header, rows) in tables.all_rows(results).items():
        _print_table(title, header, rows)
