"""Experts to one MoE checkpoint. The base's weights pass through byte for byte; adapters stand beside them."""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_moe.architectures import architecture_of
from mergekit_moe.checkpoint import companions, read_config, read_header, shards_of, write_index
from mergekit_moe.errors import ExpertError
from mergekit_moe.experts import ADAPTER, Expert, lora_key
from mergekit_moe.recipe import Merge, Router
from mergekit_moe.workspace import write_json

if TYPE_CHECKING:
    from torch import Tensor

_CODE = tuple(
    f"{name}_metamoe.py" for name in ("configuration", "dense", "experts", "layers", "loading", "modeling", "routing")
)


def merge_experts(base: Path, experts: list[Expert], merge: Merge, router: Router, *, out: Path) -> None:
    """Write a MoE checkpoint that AutoModelForCausalLM loads; its routers are still blank.

    The base FFN is stored once, in the base's own shards; each expert adds its LoRA matrices.

    Raises:
        ExpertError: if an expert holds a value that is not finite, naming its tensor.
    """
    base_config = read_config(base, "config.json", "base_model")
    base_shards = shards_of(base, "base_model")
    total = len(base_shards) + 2
    names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    for name, shard in zip(names, base_shards, strict=False):
        shutil.copyfile(base / shard, out / name)
    _write_experts(out / names[-2], experts, base_config)
    _write_blank_routers(out / names[-1], len(experts), base_config, router)
    headers = {name: read_header(out / name, "merge") for name in names}
    write_index(out, headers)
    write_json(out / "config.json", moe_config(base_config, experts, merge, router))
    for file in companions(base):
        shutil.copyfile(file, out / file.name)
    for name in _CODE:
        shutil.copyfile(Path(__file__).parent / "modeling" / name, out / name)


def moe_config(base_config: dict[str, Any], experts: list[Expert], merge: Merge, router: Router) -> dict[str, Any]:
    """Return the config.json of the unified model: the base's own, plus experts and router."""
    prefix = architecture_of(base_config, "base_model").class_prefix
    excluded = sorted({token for expert in experts for token in expert.about.get("domain_free_token_ids", [])})
    return {
        **base_config,
        "model_type": f"metamoe_{base_config['model_type']}",
        "architectures": [f"MetaMoe{prefix}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_metamoe.MetaMoe{prefix}Config",
            "AutoModel": f"modeling_metamoe.MetaMoe{prefix}Model",
            "AutoModelForCausalLM": f"modeling_metamoe.MetaMoe{prefix}ForCausalLM",
        },
        "experts": [{"name": e.name, "scale": e.scale, "ranks": e.ranks} for e in experts],
        "num_experts_per_tok": merge.top_k,
        "norm_topk_prob": merge.renormalise,
        "router_context": router.context,
        "router_excluded_token_ids": excluded,
    }


def _write_experts(path: Path, experts: list[Expert], base_config: dict[str, Any]) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    ffn = architecture_of(base_config, "base_model").ffn
    tensors: dict[str, Tensor] = {}
    for number, expert in enumerate(experts):
        with safe_open(str(expert.folder / ADAPTER), framework="pt") as adapter:
            for layer in range(base_config["num_hidden_layers"]):
                block = ffn.format(layer=layer)
                for projection in expert.ranks:
                    for factor in "AB":
                        key = lora_key(block, projection, factor)
                        tensor = adapter.get_tensor(key)
                        if not torch.isfinite(tensor).all():
                            raise ExpertError(
                                f"expert '{expert.name}': {key} holds NaN or infinity; train it again, or drop it"
                            )
                        tensors[f"{block}.experts.{number}.{projection}.lora_{factor}.weight"] = tensor
    save_file(tensors, str(path), metadata={"format": "pt"})


def _write_blank_routers(path: Path, num_experts: int, base_config: dict[str, Any], router: Router) -> None:
    import torch

    layers = base_config["num_hidden_layers"]
    weight = torch.zeros(layers, num_experts, base_config["hidden_size"])
    context = torch.full((layers,), math.log(router.context_weight / (1.0 - router.context_weight)))
    save_routers(
        path, weight, torch.zeros(layers, num_experts), context if router.context != "none" else None, base_config
    )


def save_routers(
    path: Path, weight_LKH: "Tensor", bias_LK: "Tensor", context_L: "Tensor | None", base_config: dict[str, Any]
) -> None:
    """Write one shard with every layer's router, float32."""
    from safetensors.torch import save_file

    ffn = architecture_of(base_config, "base_model").ffn
    tensors = {}
    for layer, (weight, bias) in enumerate(zip(weight_LKH, bias_LK, strict=True)):
        block = f"{ffn.format(layer=layer)}.router"
        tensors[f"{block}.weight"] = weight.contiguous()
        tensors[f"{block}.bias"] = bias.contiguous()
        if context_L is not None:
            tensors[f"{block}.context_logit"] = context_L[layer].clone()
    save_file(tensors, str(path), metadata={"format": "pt"})
