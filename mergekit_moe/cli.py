"""The `metamoe` command: one subcommand a stage; those on a recipe share their arguments. Imports nothing heavy."""

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mergekit_moe import __version__
from mergekit_moe.errors import MetaMoeError
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
    """Print the plan and every problem that files and headers show; reads no weight, starts no work."""
    from mergekit_moe.pipeline import plan

    table = Table(show_header=False, box=None)
    for name, what in plan(_job(recipe, workspace, data_dir)):
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
def merge(recipe: RecipePath, workspace: WorkspacePath = None, data_dir: DataPath = None) -> None:
    """Join the base and all experts into one MoE checkpoint with blank routers."""
    _run(recipe, workspace, data_dir, "merge")


@app.command(name="train-router")
def train_router(recipe: RecipePath, workspace: WorkspacePath = None, data_dir: DataPath = None) -> None:
    """Fit the routers on the proxies: closed form, then training."""
    _run(recipe, workspace, data_dir, "train-router")


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


def main() -> None:
    """Run the command line; a user's error is one sentence on stderr and exit code 2."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
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
    from mergekit_moe.recipe import load_recipe
    from mergekit_moe.workspace import Workspace, is_main_process

    def report(line: str) -> None:
        if is_main_process():
            console.print(_escaped(line), style="bold" if line.endswith("building") else "", highlight=False)

    loaded = load_recipe(recipe, data_dir)
    return Job(loaded, recipe.stem, Workspace(workspace or Path("runs") / recipe.stem, report))


def _run(recipe: Path, workspace: Path | None, data_dir: Path | None, only: str | None) -> None:
    from transformers.utils import logging

    from mergekit_moe.pipeline import run
    from mergekit_moe.workspace import is_main_process

    logging.disable_progress_bar()  # of loading and saving, which take moments; training keeps its own
    job = _job(recipe, workspace, data_dir)
    run(job, only)
    if only in (None, "evaluate") and is_main_process():
        _print_results(job)


def _print_results(job: "Job") -> None:
    from mergekit_moe.evaluation import tables
    from mergekit_moe.workspace import read_json

    results = read_json(job.workspace.folder("evaluation") / tables.RESULTS)
    parts = [("held-out loss, nats a token", tables.loss_rows(results)), ("unified model", tables.domain_rows(results))]
    if results["proxies"]:
        parts.append(("share of proxies with the client's true tag", tables.proxy_rows(results["proxies"])))
    for title, (header, rows) in parts:
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, name in enumerate(header):
            table.add_column(name, justify="right" if number else "left")
        for row in rows:
            table.add_row(*(cell.replace("*", "") for cell in row))
        console.print(table)
    console.print(f"model: {job.workspace.folder('model')}", highlight=False)
