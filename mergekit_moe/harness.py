"""EleutherAI's lm-evaluation-harness on a model's folder: tasks that others report, by the code that they use."""

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets.exceptions import DatasetsError
from torch.nn import functional as F

from mergekit_moe.architectures import is_encoder
from mergekit_moe.checkpoint import read_config
from mergekit_moe.data import IGNORED, collate
from mergekit_moe.errors import HarnessError
from mergekit_moe.models import load_model, load_tokenizer, scored_inputs

try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise HarnessError(
        f"lm-evaluation-harness can't be imported ({error}); `pip install 'mergekit_moe[harness]'` brings it"
    ) from None


def run_harness(
    folder: Path, tasks: list[str], *, include_path: Path | None = None, limit: int | None = None, batch_size: int = 16
) -> dict[str, Any]:
    """Return what lm-evaluation-harness makes of a causal language model: its `results`, and what tells them apart.

    The model is loaded by the classes of this package, never by code that lies beside it.

    Args:
        folder: a unified model, or any other model that transformers itself can load, with its tokenizer.
        tasks: names of tasks, groups or tags.
        include_path: a folder with more tasks, in the harness's own YAML. These may name Python code, which is run.
        limit: rows a task, the first ones.

    Raises:
        HarnessError: if the folder holds no model, there is no such task, or a task's data can't be had.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise HarnessError(f"{folder} has no {name}; give the folder of a causal language model with its tokenizer")
    if is_encoder(read_config(folder, "config.json", str(folder))):
        raise HarnessError(f"{folder} is an encoder, and the harness judges models that write; try `metamoe evaluate`")
    if not tasks:
        raise HarnessError("--tasks names none; give names of tasks or groups, such as arc_easy,hellaswag")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager_of(tasks, include_path)
    try:
        found = simple_evaluate(
            _language_model(folder, batch_size), tasks=tasks, limit=limit, task_manager=manager, log_samples=False
        )
    except (DatasetsError, OSError) as error:
        raise HarnessError(f"the rows of a task can't be had: {' '.join(str(error).split())}") from None
    kept = ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples")
    return {
        "model": folder.resolve().name,
        "lm_eval": version("lm_eval"),
        "limit": limit,
        **{key: found[key] for key in kept if key in found},
    }


def metric_rows(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows): each task's metrics with their standard errors."""
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            samples = found["n-samples"].get(task, {}).get("effective", "")
            stated = f"{error:.4f}" if isinstance(error, float) else "-"
            name = f"{task}: {metric}" + ("" if filtered == "none" else f" ({filtered})")
            rows.append([name, f"{value:.4f}", stated, str(samples)])
    return ["task: metric (filter)", "value", "std. error", "rows"], rows


def _manager_of(tasks: list[str], include_path: Path | None) -> Any:
    """Return an index of tasks: of `include_path` alone where all are there, since the harness's own takes a while."""
    if include_path is not None:
        if not include_path.is_dir():
            raise HarnessError(f"--include-path {include_path} is no folder; give one with tasks in YAML")
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if task not in manager.all_tasks:
            where = "" if include_path is None else f" nor {include_path}"
            raise HarnessError(
                f"neither lm-evaluation-harness{where} has a task '{task}'; `lm_eval ls tasks` lists its own"
            )
    return manager


def _language_model(folder: Path, batch_size: int) -> HFLM:
    model = load_model(folder).eval()
    kind = PromptContextLM if getattr(model.config, "router_context", None) == "prompt" else HFLM
    return kind(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=batch_size)


class PromptContextLM(HFLM):
    """For routers that take the mean over the prompt: HFLM tells no model where a prompt ends."""

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether it is what greedy generation would write."""
        rows = [{"input_ids": given + asked, "labels": [IGNORED] * len(given) + asked} for _, given, asked in requests]
        rows = [{name: ids[-self.max_length :] for name, ids in row.items()} for row in rows]
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]["input_ids"]))
        for first in range(0, len(order), self.batch_size):
            places = order[first : first + self.batch_size]
            batch = {name: part.to(self.device) for name, part in collate([rows[place] for place in places]).items()}
            logits = self.model(**scored_inputs(self.model, batch), use_cache=False).logits[:, :-1].float()
            labels = batch["labels"][:, 1:]
            losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
            greedy = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)
            sums = losses.cpu().double().sum(1)
            found |= {place: (-float(s), bool(g)) for place, s, g in zip(places, sums, greedy, strict=True)}
        return [found[place] for place in range(len(rows))]
