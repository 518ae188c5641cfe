"""One way to train: the transformers Trainer, quiet, seeded, and the same under `accelerate launch`."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_moe.data import collate
from mergekit_moe.recipe import Training
from mergekit_moe.workspace import is_main_process, process_state, wait_for_everyone

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


def train(
    model: "PreTrainedModel",
    rows: "Dataset",
    settings: Training,
    *,
    seed: int,
    folder: Path,
    trainer: Any = None,
    mixed: bool = False,
) -> list[dict[str, float]]:
    """Train `model` in place on tokenised rows; return the log, one entry about every twentieth of the way.

    Args:
        rows: columns `input_ids` and `labels`, and whatever else the trainer's loss reads.
        folder: where the Trainer may put its own files while it runs.
        trainer: a subclass of Trainer with another loss.
        mixed: draw batches at random; by default rows of like length share a batch, which wastes no padding
            but also sorts rows by their kind.
    """
    from transformers import Trainer, TrainingArguments, set_seed

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
        lr_scheduler_type=settings.scheduler,
        bf16=settings.bf16,
        use_cpu=process_state().device.type == "cpu",
        train_sampling_strategy="random" if mixed else "group_by_length",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),  # in a log file the printed losses show the progress
        logging_steps=0.05,
        seed=seed,
        data_seed=seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a GPU a process, by `accelerate launch`; never DataParallel
    run = (trainer or Trainer)(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    run.train()
    wait_for_everyone()
    if is_main_process():
        shutil.rmtree(scratch, ignore_errors=True)
    return [entry for entry in run.state.log_history if "loss" in entry]
