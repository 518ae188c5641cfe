"""Configurations of MetaMoE models: a dense family's own configuration plus the experts and the router.

Shipped inside every checkpoint, so it imports nothing but the standard library and transformers.
`MetaMoe<Family>Config` is generated on first use from the family's native configuration class.
"""

import re
from typing import Any

import transformers

FAMILIES = {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3"}
"""Native class prefix -> model_type. A new family is one line here and one tiny fixture in the tests."""

CONTEXTS = ("prefix", "none")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class MetaMoeConfigMixin:
    """What every MetaMoE configuration adds to its family's native one: derived values and checks."""

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
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
        experts: one dict an expert: `name`, `scale` (float) and `ranks` (projection name -> LoRA rank).
        num_experts_per_tok: top-k of the router.
        norm_topk_prob: divide the chosen experts' weights by their sum. At top-1 the weight's value is
            then exactly 1 and its gradient is the straight-through one (p / stop_gradient(p)).
            False gives Eq. 6 of the MetaMoE paper, which shrinks every FFN by its probability.
        router_context: `prefix` mixes each token's router logits with their running mean; `none` does not.
        router_excluded_token_ids: tokens (BOS) that no domain owns: they go to the seed's FFN and
            count in no mean.
    """
    name = f"MetaMoe{family}Config"
    if name not in globals():
        native = getattr(transformers, f"{family}Config")
        namespace = {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{native.__name__} with the experts and router of a MetaMoE model.",
            "__annotations__": {
                "experts": list,
                "num_experts_per_tok": int,
                "norm_topk_prob": bool,
                "router_context": str,
                "router_excluded_token_ids": list,
            },
            "model_type": f"metamoe_{FAMILIES[family]}",
            "_auto_class": "AutoConfig",
            "experts": (),
            "num_experts_per_tok": 1,
            "norm_topk_prob": True,
            "router_context": "prefix",
            "router_excluded_token_ids": (),
        }
        globals()[name] = type(name, (MetaMoeConfigMixin, native), namespace)
    return globals()[name]


def __getattr__(name: str) -> type:
    match = re.fullmatch(r"MetaMoe(\w+)Config", name)
    if match is None or match[1] not in FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class(match[1])
