"""Train a client's expert: LoRA on the FFN projections, on private rows and proxies (MetaMoE, section 3.2)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_moe.adapters import ADAPTER, ADAPTER_CONFIG
from mergekit_moe.architectures import architecture_of, classifies
from mergekit_moe.checkpoint import read_config
from mergekit_moe.data import leading_tokens, tokenize
from mergekit_moe.errors import DataError, PrivacyError
from mergekit_moe.privacy.accounting import MECHANISM, Mechanism
from mergekit_moe.privacy_recipe import Privacy
from mergekit_moe.recipe import Alignment
from mergekit_moe.training import train
from mergekit_moe.workspace import is_main_process, process_state, write_json

if TYPE_CHECKING:
    from datasets import Dataset


def align_expert(
    base: Path,
    rows: "Dataset",
    settings: Alignment,
    *,
    name: str,
    seed: int,
    out: Path,
    privacy: Privacy | None = None,
    private_rows: int = 0,
    names: list[str] | None = None,
    temperature: float = 1.0,
) -> None:
    """Write a PEFT adapter to the folder `out`, with the training log and what was spent of privacy, if anything.

    Args:
        base: the seed model's folder.
        rows: the client's private rows followed by its proxies, from `data.load_rows`.
        name: the expert's name, for errors.
        privacy: with an `expert`, training is differentially private in each row.
        private_rows: how many of the rows are private; read for `privacy` alone.
        names: an encoder's labels, its client's and the pool's. Public ones, which all clients know, keep experts that
            are trained apart from taking each other's labels for their own. Of proxies without a label it learns to
            say what the seed says, so as to know the rows that it is routed by.
        temperature: of the encoder's logits.

    Raises:
        DataError: if no row has anything to learn.
        PrivacyError: if the guarantee can't be given.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from mergekit_moe.models import adapter_silent_on, add_teacher, as_used, load_labels, load_network, load_reader

    reader = load_reader(base)
    tokens = tokenize(rows, reader, settings.max_length, names or [])
    if len(tokens) == 0:
        raise DataError(
            f"expert '{name}': no row has a token to learn within alignment.max_length {settings.max_length}"
        )
    config = read_config(base, "config.json", "base_model")
    architecture = architecture_of(config, "base_model")
    set_seed(seed)
    # An image classifier learns a head of its own; others have the seed's embedding of each name.
    head = len(names or []) if classifies(config) else 0
    labels = None if head else load_labels(base, names or [], temperature)
    network = load_network(base, head)
    tokens = add_teacher(as_used(network, base), tokens)
    adapted = get_peft_model(
        network,
        LoraConfig(
            task_type="FEATURE_EXTRACTION" if architecture.encoder else "CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            modules_to_save=["classifier"] if head else None,
            **architecture.lora_targets,
        ),
    )
    model = as_used(adapted, base, labels)
    counts = {"rows": len(rows), "private_rows": private_rows}
    plan = _plan(model, settings, privacy, counts, name) if privacy is not None and privacy.expert is not None else None
    with adapter_silent_on(model, domain_free_tokens(reader, settings)):
        if plan is None:
            log = train(model, tokens, settings, seed=seed, folder=out)
        else:
            from mergekit_moe.privacy.training import train_privately

            log = train_privately(model, tokens, settings, plan, name=name)
    if is_main_process():
        adapted.save_pretrained(out)
        for extra in set(out.iterdir()) - {out / ADAPTER, out / ADAPTER_CONFIG}:
            extra.unlink()  # peft's own card; the expert's is written when it is published
        adapter = read_config(out, ADAPTER_CONFIG, f"expert '{name}'")
        # The same training must give the same bytes: PEFT writes a set in any order, and the base's folder.
        keys = ("target_modules", "exclude_modules")
        lists = {key: sorted(adapter[key]) for key in keys if isinstance(adapter[key], list)}
        write_json(out / ADAPTER_CONFIG, {**adapter, **lists, "base_model_name_or_path": None})
        write_json(out / "training_log.json", log)
        if plan is not None:
            write_json(out / MECHANISM, plan._asdict())


def _plan(model: Any, settings: Alignment, privacy: Privacy, counts: dict[str, int], name: str) -> Mechanism:
    from mergekit_moe.privacy.training import plan_training

    assert privacy.expert is not None
    processes = process_state().num_processes
    if processes > 1:
        raise PrivacyError(
            f"expert '{name}', privacy.expert: DP-SGD samples rows in one process, and there are {processes}; run "
            "`metamoe align` without accelerate launch"
        )
    epsilon, clip = privacy.expert.epsilon, privacy.expert.clip
    return plan_training(model, settings, **counts, epsilon=epsilon, delta=privacy.delta, clip=clip, name=name)


def domain_free_tokens(reader: Any, settings: Alignment) -> list[int]:
    """Return the ids of the tokens on which the adapter stays silent."""
    return leading_tokens(reader) if settings.domain_free_bos else []
