"""Model families whose layers can take experts, told from `config.json` alone."""

import re
from typing import Any, NamedTuple

from mergekit_moe.errors import ExpertError, ExportError

CLASSIFIER = ("classifier.weight", "classifier.bias")
"""Of an image classifier's head."""


class Architecture(NamedTuple):
    """What the merger has to know of a family. The model code needs no entry of its own per family."""

    class_prefix: str
    """Of the native classes: `Llama` in LlamaForCausalLM."""
    inputs: tuple[str, ...]
    """The FFN's linear maps of its input, as the checkpoint names them."""
    output: str
    """The one back to the hidden size."""
    fused: bool = False
    """The one input map holds gate and up side by side."""
    tied: bool = False
    """The head is the embedding, where config.json doesn't say; the library leaves out what is the default."""
    ffn: str = "model.layers.{layer}.mlp"
    """Path of a layer's FFN in the checkpoint; `{layer}` is its number."""
    encoder: bool = False
    """It reads a whole text or image at once and writes none: used without a head, for what its embeddings say."""
    images: bool = False
    """It reads images."""
    tower: str | None = None
    """Of a model with two towers: the part of config.json that tells of the one whose layers take experts."""
    namesakes: tuple[str, ...] = ()
    """Modules outside the FFN whose names end as a projection's does, which an adapter has to leave out."""
    body: str = ""
    """What stands before all tensors' names but the head's, in checkpoints with a head; "" if none is read."""
    pooler: str | None = None
    """Path of what the model has only without a head."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Pieces of tensors' names in checkpoints and adapters, and what the library's modules are called now."""
    autos: tuple[str, ...] = ()
    """Auto classes that load it beside the one of its head."""

    @property
    def head(self) -> str:
        """What the native class is called after its prefix."""
        return "Model" if self.encoder else "ForCausalLM"

    def sized(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a config.json that tells of the layers that take experts."""
        return config if self.tower is None else config.get(self.tower) or {}

    def current_name(self, name: str) -> str:
        """Return what the library calls a tensor now, whatever version a file is of, with a head or without."""
        for old, new in self.renamed:
            name = name.replace(old, new)
        return name if name.startswith((self.body, *CLASSIFIER)) else self.body + name

    @property
    def lora_targets(self) -> dict[str, Any]:
        """PEFT's words for the projections of all FFNs that take experts, and for nothing else."""
        if self.tower is None:
            return {"target_modules": list(self.projections), "exclude_modules": list(self.namesakes) or None}
        block = re.escape(self.ffn).replace(re.escape("{layer}"), r"\d+")
        return {"target_modules": rf"(.*\.)?{block}\.({'|'.join(map(re.escape, self.projections))})"}

    @property
    def projections(self) -> tuple[str, ...]:
        return (*self.inputs, self.output)

    def sizes(self, config: dict[str, Any]) -> dict[str, tuple[int, int]]:
        """Return (in, out) features of each projection."""
        sized = self.sized(config)
        hidden, intermediate = sized["hidden_size"], sized["intermediate_size"]
        inputs = dict.fromkeys(self.inputs, (hidden, 2 * intermediate if self.fused else intermediate))
        return {**inputs, self.output: (intermediate, hidden)}


def _gated(class_prefix: str, *, tied: bool = False) -> Architecture:
    return Architecture(class_prefix, ("gate_proj", "up_proj"), "down_proj", tied=tied)


def _post_norm(class_prefix: str) -> Architecture:
    """Encoders of the BERT kind, saved without a head as sentence-transformers does."""
    return Architecture(
        class_prefix,
        ("intermediate.dense",),
        "output.dense",
        ffn="encoder.layer.{layer}",
        encoder=True,
        namesakes=("attention.output.dense",),
    )


ARCHITECTURES = {
    "bert": _post_norm("Bert"),
    "clip": Architecture(
        "CLIP",
        ("fc1",),
        "fc2",
        ffn="vision_model.encoder.layers.{layer}.mlp",
        encoder=True,
        images=True,
        tower="vision_config",
        autos=("AutoModelForZeroShotImageClassification",),
    ),
    "gemma": _gated("Gemma", tied=True),
    "gemma2": _gated("Gemma2", tied=True),
    "gemma3_text": _gated("Gemma3Text", tied=True),
    "gpt_neox": Architecture("GPTNeoX", ("dense_h_to_4h",), "dense_4h_to_h", ffn="gpt_neox.layers.{layer}.mlp"),
    "granite": _gated("Granite"),
    "llama": _gated("Llama"),
    "mistral": _gated("Mistral"),
    "modernbert": Architecture(
        "ModernBert",
        ("Wi",),
        "Wo",
        fused=True,
        ffn="layers.{layer}.mlp",
        encoder=True,
        namesakes=("attn.Wo",),
    ),
    "olmo2": _gated("Olmo2"),
    "phi": Architecture("Phi", ("fc1",), "fc2"),
    "phi3": Architecture("Phi3", ("gate_up_proj",), "down_proj", fused=True),
    "qwen2": _gated("Qwen2"),
    "qwen3": _gated("Qwen3"),
    "roberta": _post_norm("Roberta"),
    "smollm3": _gated("SmolLM3", tied=True),
    "starcoder2": Architecture("Starcoder2", ("c_fc",), "c_proj", tied=True),
    "vit": Architecture(
        "ViT",
        ("fc1",),
        "fc2",
        ffn="vit.layers.{layer}.mlp",
        encoder=True,
        images=True,
        body="vit.",
        pooler="vit.pooler",
        renamed=(
            ("encoder.layer.", "layers."),
            ("attention.query", "q_proj"),
            ("attention.key", "k_proj"),
            ("attention.value", "v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ),
    ),
}
"""`model_type` -> architecture. A new family is one line here, one in modeling/configuration_metamoe.py
and one fixture in the tests."""


def architecture_of(config: dict[str, Any], what: str) -> Architecture:
    """Return the architecture of a base model's config.json.

    Raises:
        ExpertError: if the family is not known; the text says which are, and where one is added.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ExpertError(
            f"{what}: model_type is {model_type!r}; supported are {', '.join(ARCHITECTURES)} "
            "(a family is added in mergekit_moe/architectures.py)"
        )
    return ARCHITECTURES[model_type]


def is_encoder(config: dict[str, Any]) -> bool:
    """Whether a config.json, of a base model or of one that was unified, is an encoder's, of texts or of images."""
    architecture = _architecture_within(config)
    return architecture is not None and architecture.encoder


def reads_images(config: dict[str, Any]) -> bool:
    """Whether a config.json, of a base model or of one that was unified, is of a model that reads images."""
    architecture = _architecture_within(config)
    return architecture is not None and architecture.images


def classifies(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a model of images that knows labels by a head alone, and by no name."""
    architecture = _architecture_within(config)
    return architecture is not None and architecture.images and architecture.tower is None


def _architecture_within(config: dict[str, Any]) -> Architecture | None:
    return ARCHITECTURES.get(str(config.get("model_type")).removeprefix("metamoe_"))


EXPORTS = {
    "mixtral": ("llama", "mistral"),
    "qwen3_moe": ("qwen3",),
    "qwen2_moe": ("qwen2",),
    "flex_olmo": ("olmo2",),
}
"""Native MoE family -> the dense families whose attention and norms it shares exactly (export.py writes them)."""


def require_export(target: str, model_type: str, *, renormalises: bool) -> None:
    """Raise ExportError unless the native family `target` can hold a unified model of this dense family.

    Args:
        target: model_type of the export.
        model_type: of the base model.
        renormalises: whether the chosen experts' weights are divided by their sum.
    """
    if target not in EXPORTS:
        raise ExportError(f"no export format is called '{target}'; allowed are {', '.join(EXPORTS)}")
    if model_type not in EXPORTS[target]:
        fitting = [name for name, families in EXPORTS.items() if model_type in families]
        remedy = f"it can become {', '.join(fitting)}" if fitting else "no native format fits that family"
        raise ExportError(f"a {model_type} model can't be exported as {target}; {remedy}")
    if target == "mixtral" and not renormalises:
        raise ExportError("mixtral always renormalises its experts' weights, and this model doesn't; merge it anew")
