"""Configurations of MetaMoE models: a dense family's own configuration plus the experts and the router.

Shipped inside every checkpoint, so it imports nothing but the standard library and transformers.
`MetaMoe<Family>Config` is generated on first use from the family's native configuration class.
"""

import re
from typing import Any

import transformers

DECODERS = {
    "Gemma": "gemma",
    "Gemma2": "gemma2",
    "Gemma3Text": "gemma3_text",
    "GPTNeoX": "gpt_neox",
    "Granite": "granite",
    "Llama": "llama",
    "Mistral": "mistral",
    "Olmo2": "olmo2",
    "Phi": "phi",
    "Phi3": "phi3",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "SmolLM3": "smollm3",
    "Starcoder2": "starcoder2",
}
ENCODERS = {
    "Bert": "bert",
    "CLIP": "clip",
    "CLIPVision": "clip_vision_model",
    "ModernBert": "modernbert",
    "Roberta": "roberta",
    "ViT": "vit",
}
FAMILIES = {**DECODERS, **ENCODERS}
"""Native class prefix -> model_type of the families that the tests run over.

Any other family whose layers own a recognisable FFN works too (`FORMS` in experts_metamoe.py).
"""

KINDS = ("lora", "dense")
CONTEXTS = ("prefix", "prompt", "mean", "none")
_UNNORMALISED = ("Olmo2",)
"""Families that normalise after their FFN: what goes into it, and so into the router, has any length."""


def expert_rank(expert: dict[str, Any], projection: str, layer: int) -> int:
    """Return the rank of an expert's difference in one projection of one layer; 0 where it has none."""
    rank = expert.get("ranks", {}).get(projection, 0)
    return int(rank[layer] if isinstance(rank, list | tuple) else rank)


class MetaMoeConfigMixin:
    """What every MetaMoE configuration adds to its family's native one: derived values and checks."""

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def dense_experts(self) -> list[int]:
        """Numbers of the experts that are whole FFNs."""
        return [number for number, expert in enumerate(self.experts) if expert.get("kind") == "dense"]

    @property
    def shares_ffn(self) -> bool:
        """Whether the seed's own FFN is there: for factored experts, an anchor, or tokens that no domain owns."""
        return len(self.dense_experts) < len(self.experts) or bool(self.router_excluded_token_ids)

    @property
    def sized(self) -> Any:
        """The part that tells of the layers that own experts: an image tower's where there is one, else the whole."""
        return getattr(self, "vision_config", self)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for expert in self.experts:
            if expert.get("kind", "lora") not in KINDS:
                raise ValueError(
                    f"expert {expert.get('name')!r} is of kind {expert['kind']!r}; allowed are {', '.join(KINDS)}"
                )
        if self.router_context not in CONTEXTS:
            raise ValueError(f"router_context is {self.router_context!r}; allowed are {', '.join(CONTEXTS)}")
        if self.experts and not 1 <= self.num_experts_per_tok <= len(self.experts):
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; it must lie between 1 and the "
                f"{len(self.experts)} experts"
            )


def config_class(family: str) -> type:
    """Return `MetaMoe<family>Config`, a subclass of the family's native configuration.

    Fields added to the native ones:
        experts: one dict an expert: `name`, `scale` (float) and `ranks` (projection name -> LoRA rank, or a list
            with one for every layer). An expert without ranks is the seed's own FFN: an anchor. One with `kind`
            `dense` is a whole FFN of its own, and has neither.
        num_experts_per_tok: top-k of the router.
        norm_topk_prob: divide the chosen experts' weights by their sum. At top-1 the weight's value is
            then exactly 1 and its gradient is the straight-through one (p / stop_gradient(p)).
            False gives Eq. 6 of the MetaMoE paper, which shrinks every FFN by its probability.
        router_context: `prefix` mixes each token's router logits with their running mean (decoders), `prompt`
            with their mean over the prompt, frozen for the completion (decoders), `mean` with their mean
            over the whole text or image (encoders); `none` does not mix.
        router_input_norm: scale the router's input to root mean square 1.
        router_absolute_scores: route by the scores' absolute values, for rows whose sign means nothing (Arrow).
        router_adds_layers: add to each layer's router logits those of all layers before it, so that a layer that can't
            tell domains apart goes by what was told already.
        router_excluded_token_ids: tokens (BOS) that no domain owns: they go to the seed's FFN and
            count in no mean.
        output_router_logits: return the routers' logits, and add the losses below to the model's.
        router_aux_loss_coef: weight of the load-balancing loss (Switch Transformer, Eq. 4 to 6).
        router_z_loss_coef: weight of the z loss, the mean squared logsumexp (ST-MoE, Eq. 5).
    """
    name = f"MetaMoe{family}Config"
    if name not in globals():
        native = getattr(transformers, f"{family}Config")
        defaults = {
            "experts": (),
            "num_experts_per_tok": 1,
            "norm_topk_prob": True,
            "router_context": "mean" if family in ENCODERS else "prefix",
            "router_input_norm": family in _UNNORMALISED,
            "router_absolute_scores": False,
            "router_adds_layers": False,
            "router_excluded_token_ids": (),
            "output_router_logits": False,
            "router_aux_loss_coef": 0.0,
            "router_z_loss_coef": 0.0,
        }
        types = {name: list if value == () else type(value) for name, value in defaults.items()}
        namespace = {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{native.__name__} with the experts and router of a MetaMoE model.",
            "__annotations__": types,
            "model_type": f"metamoe_{native.model_type}",
            "_auto_class": "AutoConfig",
            "base_model_tp_plan": _without_ffn(native.base_model_tp_plan),
            **defaults,
        }
        globals()[name] = type(name, (MetaMoeConfigMixin, native), namespace)
    return globals()[name]


def _without_ffn(plan: dict[str, Any] | None) -> dict[str, Any] | None:
    # Experts' low-rank factors are whole on every rank, so the FFN that they belong to has to be too.
    return plan and {module: style for module, style in plan.items() if ".mlp." not in module}


def __getattr__(name: str) -> type:
    match = re.fullmatch(r"MetaMoe(\w+)Config", name)
    if match is None or not hasattr(transformers, f"{match[1]}Config"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class(match[1])
