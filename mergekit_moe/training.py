"""One way to train: the transformers Trainer, quiet, seeded, and the same under `accelerate launch`.

A run that is killed goes on from its last checkpoint, and ends as if nobody had killed it.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from mergekit_moe.data import collate
from mergekit_moe.recipe import Training
from mergekit_moe.workspace import is_main_process, process_state, wait_for_everyone

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_PART = 0.05
"""Share of the way after which the loss is printed, the model judged and a checkpoint written."""
_WEIGHTS = "trained.safetensors"
_STATE = "trainer_state.json"


class PartTrainer(Trainer):
    """Trainer whose checkpoints hold what trains, and nothing of what is frozen."""

    def trained(self) -> dict[str, Tensor]:
        """Return the parameters that train, by name."""
        return {name: tensor.detach() for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            own = self.trained() if state_dict is None else {name: state_dict[name] for name in self.trained()}
            save_file({name: tensor.cpu().contiguous() for name, tensor in own.items()}, folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        own = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        (self.model if model is None else model).load_state_dict(own, strict=False)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


class LossLines(TrainerCallback):
    """A line about the loss with every entry of the log: in a file there is no bar to look at."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        losses = _losses(logs or {})
        if state.is_local_process_zero and losses:
            print(f"  step {state.global_step:,} of {state.max_steps:,}: {losses}", flush=True)


class LossBar(ProgressCallback):
    """The Trainer's bar, with the loss beside it in place of a line for every entry of the log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        losses = _losses(logs or {})
        if self.training_bar is not None and losses:
            self.training_bar.set_postfix_str(losses)


def _losses(log: dict[str, Any]) -> str:
    names = {"loss": "loss", "eval_loss": "held-out loss"}
    return ", ".join(f"{name} {float(log[key]):.4f}" for key, name in names.items() if key in log)


def train(
    model: "PreTrainedModel",
    rows: "Dataset",
    settings: Training,
    *,
    seed: int,
    folder: Path,
    trainer: Any = PartTrainer,
    mixed: bool = False,
    judges: "Dataset | None" = None,
    patience: int | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place on tokenised rows; return the log, one entry about every twentieth of the way.

    Args:
        rows: columns that `data.tokenize` makes, and whatever else the trainer's loss reads.
        folder: where the Trainer may put its own files while it runs; what a killed run left there is gone on with.
        trainer: a PartTrainer with another loss.
        mixed: draw batches at random; by default rows of like length share a batch, which wastes no padding
            but also sorts rows by their kind.
        judges: rows that the trainer evaluates on, for `patience`.
        patience: stop after so many evaluations without a better loss, and go back to the best. Needs `judges`.
    """
    set_seed(seed)
    scratch = folder / "trainer"
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type=settings.scheduler,
        bf16=settings.bf16,
        use_cpu=process_state().device.type == "cpu",
        train_sampling_strategy="random" if mixed or "input_ids" not in rows.column_names else "group_by_length",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_steps=_PART,
        save_total_limit=1,
        eval_strategy="no" if patience is None else "steps",
        eval_steps=_PART,
        load_best_model_at_end=patience is not None,
        metric_for_best_model="loss",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),  # in a log file the printed losses show the progress
        logging_steps=_PART,
        seed=seed,
        data_seed=seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a GPU a process, by `accelerate launch`; never DataParallel
    callbacks = [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]
    data = {"train_dataset": rows, "eval_dataset": judges, "data_collator": collate}
    # Not by `optim`: not every release of the library hands its arguments on to SGD.
    chosen = None if settings.optimizer == "adamw" else optimizer_of(settings)
    run = trainer(model=model, args=arguments, callbacks=callbacks, optimizer_cls_and_kwargs=chosen, **data)
    for callback in (PrinterCallback, ProgressCallback):
        run.remove_callback(callback)
    run.add_callback(LossLines if arguments.disable_tqdm else LossBar)
    _go_on(run, _last_checkpoint(scratch))
    wait_for_everyone()
    if is_main_process():
        shutil.rmtree(scratch, ignore_errors=True)
    return [entry for entry in run.state.log_history if "loss" in entry or "eval_loss" in entry]


def optimizer_of(settings: Training) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, float]]:
    """Return an optimizer's class and its arguments, but for the weight decay."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD, {"lr": settings.learning_rate, "momentum": settings.momentum}
    return torch.optim.AdamW, {"lr": settings.learning_rate}


def _go_on(run: PartTrainer, checkpoint: Path | None) -> None:
    """Train from the checkpoint, or from the start; the Trainer would take a step more from one at the very end."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / _STATE))
        if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            run.state = state
            run._load_from_checkpoint(state.best_model_checkpoint or str(checkpoint))
            return
    run.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _last_checkpoint(scratch: Path) -> Path | None:
    """Return the last checkpoint that is whole and of as many processes as there are now; None if there is none."""
    whole: dict[int, Path] = {}
    for folder in scratch.glob("checkpoint-*"):
        try:
            TrainerState.load_from_json(str(folder / _STATE))  # written last
        except (OSError, ValueError):
            continue
        if len(list(folder.glob("rng_state*.pth"))) == process_state().num_processes:
            whole[int(folder.name.rpartition("-")[2])] = folder
    return whole[max(whole)] if whole else None
