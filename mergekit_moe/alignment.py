"""Train a client's expert: LoRA on the FFN projections, on private rows and proxies (MetaMoE, section 3.2)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_moe.adapters import ADAPTER, ADAPTER_CONFIG
from mergekit_moe.architectures import architecture_of
from mergekit_moe.checkpoint import read_config
from mergekit_moe.data import leading_tokens, tokenize
from mergekit_moe.errors import DataError
from mergekit_moe.recipe import Alignment
from mergekit_moe.training import train
from mergekit_moe.workspace import is_main_process, write_json

if TYPE_CHECKING:
    from datasets import Dataset


def align_expert(base: Path, rows: "Dataset", settings: Alignment, *, name: str, seed: int, out: Path) -> None:
    """Write a PEFT adapter to the folder `out`, with the training log.

    Args:
        base: the seed model's folder.
        rows: the client's private rows followed by its proxies, from `data.load_rows`.
        name: the expert's name, for errors.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from mergekit_moe.models import adapter_silent_on, load_model, load_tokenizer

    tokenizer = load_tokenizer(base)
    tokens = tokenize(rows, tokenizer, settings.max_length)
    if len(tokens) == 0:
        raise DataError(
            f"expert '{name}': no row has a token to learn within alignment.max_length {settings.max_length}"
        )
    architecture = architecture_of(read_config(base, "config.json", "base_model"), "base_model")
    set_seed(seed)
    model = get_peft_model(
        load_model(base),
        LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(architecture.projections),
        ),
    )
    with adapter_silent_on(model, domain_free_tokens(tokenizer, settings)):
        log = train(model, tokens, settings, seed=seed, folder=out)
    if is_main_process():
        model.save_pretrained(out)
        for extra in set(out.iterdir()) - {out / ADAPTER, out / ADAPTER_CONFIG}:
            extra.unlink()  # peft's own card; the expert's is written when it is published
        config = read_config(out, ADAPTER_CONFIG, f"expert '{name}'")
        # The same training must give the same bytes: PEFT writes a set in any order, and the base's folder.
        plain = {"target_modules": sorted(config["target_modules"]), "base_model_name_or_path": None}
        write_json(out / ADAPTER_CONFIG, {**config, **plain})
        write_json(out / "training_log.json", log)


def domain_free_tokens(tokenizer: Any, settings: Alignment) -> list[int]:
    """Return the ids of the tokens on which the adapter stays silent."""
    return leading_tokens(tokenizer) if settings.domain_free_bos else []
