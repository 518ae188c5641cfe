"""A unified model's way to a native family: fit plain gates, write, measure, say what was lost."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_moe import cards, data
from mergekit_moe.architectures import reads_images
from mergekit_moe.checkpoint import license_of, read_config
from mergekit_moe.errors import DataError, ExportError
from mergekit_moe.export import observe, read_source, report_on, trained_gates, write_export
from mergekit_moe.models import load_model, load_tokenizer
from mergekit_moe.recipe import DataSource
from mergekit_moe.routing.refit import plain_gates
from mergekit_moe.routing.training import hold_out
from mergekit_moe.workspace import new_folder, write_json

if TYPE_CHECKING:
    from datasets import Dataset


def export_model(folder: Path, target: str, out: Path, proxies: "Dataset | None" = None) -> dict[str, Any]:
    """Write a unified model as the native family `target`; return what export_report.json says.

    The folder `out` appears by rename, whole or not at all.

    Raises:
        ExportError: if the format can't hold the model, or the gates need proxies and there are none.
        WorkspaceError: if `out` is there already.
    """
    with new_folder(out) as partial:
        read_source(folder, target)
        return fill_export(folder, target, proxies, name=out.name, license=license_of(folder), out=partial)


def fill_export(
    folder: Path, target: str, proxies: "Dataset | None", *, name: str, license: str, out: Path
) -> dict[str, Any]:
    """Write the native checkpoint, its report and its card to the empty folder `out`; return the report.

    Args:
        proxies: tokenised rows with a column `expert`: they fit the plain gates, and every tenth judges.
        name: the model's, for its card.
        license: likewise.
    """
    source = read_source(folder, target)
    config, seen = source.config, []
    if proxies is None:
        write_export(source, trained_gates(source), out)
        fitting = "as trained"
    else:
        _require_every_expert(config.experts, proxies)
        learnt, held_out = hold_out(proxies)
        gates, fitting = plain_gates(load_model(folder), learnt)
        write_export(source, gates, out)
        for place in (folder, out):
            excluded = list(config.router_excluded_token_ids)
            seen.append(observe(load_model(place), held_out, config.num_experts_per_tok, excluded))
    report = report_on(source, fitting, *(seen or (None, None)))
    write_json(out / "export_report.json", report)
    card = cards.render("export.md.j2", name=name, license=license, report=report)
    (out / "README.md").write_text(card, encoding="utf-8")
    return report


def proxies_from_file(path: Path, folder: Path, max_length: int = 512) -> "Dataset":
    """Return tokenised proxies from rows with the columns `text` and `expert` (a name).

    Raises:
        ExportError: if the folder holds no unified model with its tokenizer.
        DataError: if the file can't be read, or lacks one of the columns.
    """
    from datasets import concatenate_datasets

    config = read_config(folder, "config.json", "export")
    experts = config.get("experts")
    if reads_images(config):
        raise ExportError(f"{folder} reads images, and --proxies are rows of text; fit its routers by a recipe")
    if not experts or not (folder / "tokenizer_config.json").is_file():
        raise ExportError(f"{folder} has no experts in its config, or no tokenizer; give the folder of a unified model")
    source = DataSource(dataset=str(path.absolute()), text="{text}", tag="expert")
    rows = data.load_rows([source], Path(), "--proxies")
    tokenizer = load_tokenizer(folder)
    parts = []
    for number, expert in enumerate(experts):
        chosen = rows.select([row for row, tag in enumerate(rows["tag"]) if tag == expert["name"]])
        if len(chosen) == 0:
            raise DataError(f"--proxies: no row has the expert '{expert['name']}'; every expert needs some")
        tokens = data.tokenize(chosen, tokenizer, max_length)
        parts.append(tokens.add_column("expert", [number] * len(tokens)))
    return concatenate_datasets(parts)


def _require_every_expert(experts: list[dict[str, Any]], proxies: "Dataset") -> None:
    present = set(proxies["expert"])
    for number, expert in enumerate(experts):
        if number not in present:
            raise DataError(f"--proxies: no row of the expert '{expert['name']}' has a token; every expert needs some")
