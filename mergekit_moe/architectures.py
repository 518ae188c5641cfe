"""Model families whose layers can take experts, told from `config.json` alone."""

from typing import Any, NamedTuple

from mergekit_moe.errors import ExpertError


class Architecture(NamedTuple):
    """What the merger has to know of a family. The model code needs no entry of its own per family."""

    class_prefix: str
    """Of the native classes: `Llama` in LlamaForCausalLM."""
    ffn: str
    """Path of a layer's FFN in the checkpoint; `{layer}` is its number."""
    projections: tuple[str, ...]
    """The FFN's linear maps, as the checkpoint names them."""

    def sizes(self, config: dict[str, Any]) -> dict[str, tuple[int, int]]:
        """Return (in, out) features of each projection."""
        hidden, intermediate = config["hidden_size"], config["intermediate_size"]
        return {
            name: (intermediate, hidden) if name.startswith("down") else (hidden, intermediate)
            for name in self.projections
        }


def _gated(class_prefix: str) -> Architecture:
    return Architecture(class_prefix, "model.layers.{layer}.mlp", ("gate_proj", "up_proj", "down_proj"))


ARCHITECTURES = {
    "llama": _gated("Llama"),
    "mistral": _gated("Mistral"),
    "qwen2": _gated("Qwen2"),
    "qwen3": _gated("Qwen3"),
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
