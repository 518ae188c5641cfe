"""Load models for the stages, and look at what happens inside their FFNs and routers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from mergekit_moe.adapters import ADAPTER_CONFIG
from mergekit_moe.architectures import classifies, is_encoder, reads_images
from mergekit_moe.checkpoint import pooling_of, read_config
from mergekit_moe.data import IGNORED, batches
from mergekit_moe.experts import ABOUT
from mergekit_moe.images import ImageReader
from mergekit_moe.matching import CLASSIFIED, PROJECTED, LabelMatcher, Labels, body_of, embed_labels
from mergekit_moe.modeling.routing_metamoe import ContextRouter, Routing, prompt_tokens
from mergekit_moe.workspace import process_state

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 64


class RouterCall(NamedTuple):
    """What one router saw and said in one forward pass."""

    hidden: Tensor
    """(B, T, H), the FFN's input, normalised where the router normalises it."""
    routing: Routing
    logits: Tensor
    """(B, T, K), float32."""
    context: str
    """The router's context: over which tokens it takes the mean."""


def load_network(folder: Path, head: int = 0) -> PreTrainedModel:
    """Return a folder's own model on this process's device, in the dtype that it is stored in.

    A causal language model, an image classifier, or an encoder without a head. Never runs a checkpoint's own code.

    Args:
        head: of an image classifier: give it a new head over so many labels, whatever it had.
    """
    config = read_config(folder, "config.json", str(folder))
    if head:
        given = {"num_labels": head, "ignore_mismatched_sizes": True}
        network = AutoModelForImageClassification.from_pretrained(
            folder, dtype="auto", trust_remote_code=False, **given
        )
        return network.to(process_state().device)
    auto = AutoModel if is_encoder(config) else AutoModelForCausalLM
    if str(config.get("architectures")).endswith("ForImageClassification']"):
        auto = AutoModelForImageClassification
    return auto.from_pretrained(folder, dtype="auto", trust_remote_code=False).to(process_state().device)


def as_used(network: Any, folder: Path, labels: Labels | None = None) -> Any:
    """Return a model that takes collated rows: the language model itself, an encoder in a LabelMatcher.

    Args:
        network: from `load_network`, or one that PEFT made of it.
        folder: of the base or unified model, which says how an encoder's token states become one vector.
        labels: what an encoder's texts or images are compared with.
    """
    config = network.config.to_dict()
    if not is_encoder(config):
        return network
    return LabelMatcher(network, _pooling(config, folder), labels)


def _pooling(config: dict[str, Any], folder: Path) -> str:
    if classifies(config):
        return CLASSIFIED
    return PROJECTED if reads_images(config) else pooling_of(folder, str(folder))


def network_of(model: Any) -> Any:
    """Return the transformers model inside what `as_used` returned."""
    return model.encoder if isinstance(model, LabelMatcher) else model


def shared_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return by name the parameters that a base has in common with all of its experts: of classifiers no head."""
    if not isinstance(model, LabelMatcher) or model.pooling != CLASSIFIED:
        return dict(model.named_parameters())
    named = body_of(model.encoder).named_parameters()
    return {name: parameter for name, parameter in named if not name.startswith("pooler.")}


def load_model(folder: Path, labels: Labels | None = None) -> Any:
    """Return the model of a base or unified model's folder, as it is used."""
    return as_used(load_network(folder), folder, labels)


def load_expert(base: Path, expert: Path, labels: Labels | None = None) -> Any:
    """Return an expert as a plain model, by PEFT and transformers alone: the base with its adapter, or a fine-tune."""
    if not (expert / ADAPTER_CONFIG).is_file():
        return as_used(load_network(expert), base, labels)
    return as_used(load_adapted(base, expert).merge_and_unload(), base, labels)


def load_adapted(base: Path, expert: Path) -> Any:
    """Return the base with an expert's adapter, by PEFT; of an image classifier with the expert's own head."""
    from peft import PeftModel

    about = read_config(expert, ABOUT, str(expert)) if (expert / ABOUT).is_file() else {}
    return PeftModel.from_pretrained(load_network(base, len(about.get("labels", []))), str(expert))


def load_labels(base: Path, names: list[str], temperature: float) -> Labels | None:
    """Return labels as the seed embeds them; None without any, as for language models."""
    if not names:
        return None
    return embed_labels(load_model(base), load_tokenizer(base), names, temperature)


@torch.no_grad()
def add_teacher(model: Any, rows: "Dataset") -> "Dataset":
    """Return tokenised rows with a column `taught` (D,): where an encoder puts those that have no label, now.

    A row with a column `expert` is sent to that one. Rows of a language model are returned as they are.
    """
    if network_of(model) is model:
        return rows
    model.eval()
    unlabelled = [place for place, label in enumerate(rows["labels"]) if label == IGNORED]
    taught = torch.zeros(len(rows), model.size)
    seen = 0
    for batch in batches(rows, _BATCH, model.device, unlabelled):
        said = model(**scored_inputs(model, batch), forced_expert=batch.get("expert")).embeddings
        taught[unlabelled[seen : seen + len(said)]] = said.cpu()
        seen += len(said)
    return rows.add_column("taught", list(taught.numpy()))


def load_tokenizer(folder: Path) -> Any:
    """Return a model folder's tokenizer; never runs a checkpoint's own code."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_reader(folder: Path) -> Any:
    """Return what `data.tokenize` makes a model's inputs by: its tokenizer, or the reader of its images."""
    if reads_images(read_config(folder, "config.json", str(folder))):
        return ImageReader(folder)
    return load_tokenizer(folder)


def scored_inputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what `model` reads of a collated batch when nobody asks it for a loss.

    A router whose context is the prompt has to be told which tokens that is.
    """
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "pixel_values")}
    if getattr(model.config, "router_context", None) == "prompt":
        routed = model.base_model.routed_tokens(inputs["input_ids"], None, inputs["attention_mask"])
        inputs["prompt_mask"] = prompt_tokens(batch["labels"], routed, None)
    return inputs


def routed_tokens(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return (B, T) bool: the tokens of a collated batch that a MoE model routes; of an image all patches and CLS."""
    if "pixel_values" not in batch:
        return model.base_model.routed_tokens(batch["input_ids"], None, batch["attention_mask"])
    rows, _, *sides = batch["pixel_values"].shape
    patches = math.prod(side // model.config.sized.patch_size for side in sides)
    return torch.ones(rows, 1 + patches, dtype=torch.bool, device=batch["pixel_values"].device)


def counted_tokens(batch: dict[str, Tensor], hidden: Tensor, silent: list[int]) -> Tensor:
    """Return (B, T) bool: the tokens of a collated batch that count in a mean, for their (B, T, H) hidden states.

    Args:
        silent: ids of the tokens that belong to no domain.
    """
    if "pixel_values" in batch:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    unknown = torch.tensor(silent, dtype=torch.long, device=hidden.device)
    return batch["attention_mask"].bool() & ~torch.isin(batch["input_ids"], unknown)


def only_chooses(config: Any) -> bool:
    """Whether a unified model's routers choose and no more: one expert a token, whose weight is 1 whatever they say."""
    return bool(config.num_experts_per_tok == 1 and config.norm_topk_prob)


def routers_of(model: nn.Module) -> list[ContextRouter]:
    """Return a MoE model's routers, layer by layer."""
    return [module for module in model.modules() if isinstance(module, ContextRouter)]


@contextmanager
def recorded_routers(model: nn.Module) -> Iterator[list[RouterCall]]:
    """Yield a list that every forward pass inside the block fills anew, one entry a layer."""
    calls: list[RouterCall] = []

    def begin(module: nn.Module, args: Any) -> None:
        calls.clear()

    def record(module: ContextRouter, args: Any, logits: Tensor) -> None:
        # An image's mask is one for all of its patches.
        routing = args[1]._replace(token_mask=args[1].token_mask.expand(logits.shape[:2]))
        calls.append(RouterCall(args[0], routing, logits, module.context))

    handles = [model.register_forward_pre_hook(begin)]
    handles += [router.register_forward_hook(record) for router in routers_of(model)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_ffn_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that a forward pass inside the block fills with each FFN's input (B, T, H), layer by layer.

    Of a model with two towers those of the image tower, which is the one that takes experts.
    """
    inputs: list[Tensor] = []
    # An encoder of the BERT kind has its FFN in two modules of the layer.
    found = [(name, module) for name, module in model.named_modules() if name.endswith((".mlp", ".intermediate"))]
    feed_forwards = [pair for pair in found if "vision_model" in pair[0].split(".")] or found
    handles = [m.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for _, m in feed_forwards]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def adapter_silent_on(model: nn.Module, token_ids: list[int]) -> Iterator[None]:
    """Inside the block, a PEFT model's LoRA deltas are zero on these tokens.

    BOS stands before every domain and all later tokens attend to it, so that no causal router can know
    its domain. Trained like this, an expert never relies on its own delta there.
    """
    if not token_ids:
        yield
        return
    silent = torch.tensor(token_ids, dtype=torch.long)
    keep: dict[str, Tensor] = {}

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        keep["mask"] = ~torch.isin(ids, silent.to(ids.device))

    def silence(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * keep["mask"].unsqueeze(-1).to(output.dtype)

    handles = [model.register_forward_pre_hook(look, with_kwargs=True)]
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("lora_B"):
            handles.append(module.register_forward_hook(silence))
    assert len(handles) > 1, "no LoRA layer in this model"
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_statistics(file: Path) -> dict[str, Tensor]:
    """Return an expert's routing statistics: `count` (), `sum` (L, H), and `noise` (L,), the variance that is noise.

    The noise is that of each number of sum / count, and 0 where the statistics were not noised.
    """
    from safetensors.torch import load_file

    published = load_file(file)
    layers = range(sum(key.endswith(".sum") for key in published))
    none = torch.tensor(0.0, dtype=torch.float64)
    return {
        "count": published["layers.0.count"],
        "sum": torch.stack([published[f"layers.{layer}.sum"] for layer in layers]),
        "noise": torch.stack([published.get(f"layers.{layer}.noise_variance", none) for layer in layers]),
    }
