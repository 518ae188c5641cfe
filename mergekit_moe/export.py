"""Export to a native MoE family of transformers: no code of ours, no context in the router.

Experts are folded to whole FFNs and streamed tensor by tensor; what the plain gate loses is measured.

Shapes: L layers, K experts, H hidden, k experts per token.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

import mergekit_moe.modeling  # noqa: F401  registers the classes that read the folder
from mergekit_moe.architectures import require_export
from mergekit_moe.checkpoint import companions, read_config, shards_of
from mergekit_moe.data import batches
from mergekit_moe.errors import ExportError
from mergekit_moe.modeling.configuration_metamoe import expert_rank
from mergekit_moe.modeling.routing_metamoe import ContextRouter
from mergekit_moe.models import only_chooses
from mergekit_moe.weights import DTYPES, SHARD_BYTES, Planned, Weights, passed_through, write_weights

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_BATCH = 16
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_OURS = "metamoe_"


class Target(NamedTuple):
    """A native MoE family and how its checkpoints name things."""

    native: str
    """Prefix of its classes."""
    block: str = "mlp"
    names: tuple[str, str, str] = _PROJECTIONS
    """Of gate, up and down."""
    attention_bias: bool = True
    """Whether its attention can have biases."""
    per_layer_windows: bool = False
    """Whether it can give some layers a sliding window and others none."""


TARGETS = {
    "mixtral": Target("Mixtral", "block_sparse_moe", ("w1", "w3", "w2"), attention_bias=False),
    "qwen3_moe": Target("Qwen3Moe"),
    "qwen2_moe": Target("Qwen2Moe", per_layer_windows=True),
    "flex_olmo": Target("FlexOlmo"),
}
"""model_type of the export -> how it is made; which families fit stands in architectures.py."""


class Source(NamedTuple):
    """A unified model that can be exported as asked."""

    folder: Path
    target: str
    config: Any
    weights: Weights


def read_source(folder: Path, target: str) -> Source:
    """Return what can be told from config and headers, no weight read.

    Raises:
        ExportError: if the folder is no unified model, or the format can't hold it exactly.
    """
    raw = read_config(folder, "config.json", "export")
    model_type = str(raw.get("model_type"))
    if not model_type.startswith(_OURS):
        raise ExportError(f"{folder} holds a model of type '{model_type}', not one that `metamoe merge` made")
    require_export(target, model_type.removeprefix(_OURS), renormalises=raw.get("norm_topk_prob", True))
    form = TARGETS[target]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    weights = Weights(folder, shards_of(folder, "export"), "export")
    layers = getattr(config, "layer_types", None) or []
    if not form.per_layer_windows and "sliding_attention" in layers:
        raise ExportError(f"{target} can't give single layers a sliding window; set use_sliding_window false")
    for name in weights:
        attention = ".self_attn." in name and form.attention_bias
        if name.endswith(".bias") and not name.endswith(".router.bias") and not attention:
            raise ExportError(f"{target} has no place for the bias {name}; this model can't be exported exactly")
    return Source(folder, target, config, weights)


def trained_gates(source: Source) -> Tensor:
    """Return the model's own gates, (L, K, H) float32, where a plain gate says exactly what they say.

    Raises:
        ExportError: if context, a bias, or weights on a normalised input make proxies necessary.
    """
    config = source.config
    why = None
    if config.router_context != "none":
        why = "its routers use context"
    elif config.router_adds_layers:
        why = "its routers add up what earlier layers said"
    elif config.router_absolute_scores:
        why = "its routers take absolute scores"
    elif config.router_input_norm and not only_chooses(config):  # a token's length changes no choice
        why = "its routers normalise their input, which changes the weights of experts"
    elif any(
        bool(_read(source, f"{_ffn(layer)}.router.bias").any()) for layer in range(source.config.num_hidden_layers)
    ):
        why = "its routers have biases"
    if why is not None:
        raise ExportError(f"{why}, and {source.target} gates are plain; give the proxies to fit them again")
    layers = range(config.num_hidden_layers)
    return torch.stack([_read(source, f"{_ffn(layer)}.router.weight").float() for layer in layers])


def write_export(source: Source, gates_LKH: Tensor, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the native checkpoint to the folder `out`: weights, config, tokenizer and generation files.

    Args:
        gates_LKH: the plain gates; stored in the dtype of the experts.
        shard_bytes: a shard takes no further tensor that would make it larger.

    Raises:
        MetaMoeError: if a tensor is missing or isn't finite, naming it.
    """
    write_weights(out, [_planned(source, gates_LKH)], shard_bytes=shard_bytes)
    native_config(source).save_pretrained(out)
    for companion in companions(source.folder):
        shutil.copyfile(companion, out / companion.name)


def native_config(source: Source) -> Any:
    """Return the native configuration: every field that both families know, and the experts' sizes."""
    form, ours = TARGETS[source.target], source.config
    kind = getattr(transformers, f"{form.native}Config")
    own = {"model_type", "architectures", "transformers_version", "_name_or_path", "num_local_experts", "num_experts"}
    known = {**kind().to_dict(), "head_dim": None}
    fields = {name: getattr(ours, name) for name in known if name not in own and hasattr(ours, name)}
    if fields.get("head_dim") is None:
        fields.pop("head_dim", None)
    experts = "num_local_experts" if source.target == "mixtral" else "num_experts"
    fields[experts] = len(ours.experts)
    fields["sliding_window"] = getattr(ours, "sliding_window", None)
    if source.target.startswith("qwen"):
        fields |= {"moe_intermediate_size": ours.intermediate_size, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if source.target == "qwen2_moe":
        # The family can't do without a shared expert: one of real size, all zero (vLLM and GGUF tools read the size).
        fields |= {"shared_expert_intermediate_size": ours.intermediate_size, "qkv_bias": True}
    if source.target == "flex_olmo":
        fields.pop("sliding_window")
    config = kind(**fields)
    config.architectures = [f"{form.native}ForCausalLM"]
    return config


def fold(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Return W + scale * B A, computed in float64, in W's dtype. Shapes: (out, in), (r, in), (out, r)."""
    return (weight.double() + scale * (lora_B.double() @ lora_A.double())).to(weight.dtype)


def _ffn(layer: int) -> str:
    return f"model.layers.{layer}.mlp"


def _require(source: Source, name: str) -> str:
    """Return the tensor's name; the model has to hold it."""
    if name not in source.weights:
        raise ExportError(f"{source.folder} lacks {name}; it is no whole unified model with experts of a known kind")
    return name


def _read(source: Source, name: str) -> Tensor:
    return source.weights.read(_require(source, name))


def _planned_expert(source: Source, layer: int, number: int, projection: str, name: str) -> Planned:
    """Return an expert's whole matrix, called `name` in the export."""
    expert, block = source.config.experts[number], _ffn(layer)
    own, shared = f"{block}.experts.{number}.{projection}", f"{block}.{projection}.weight"
    if expert.get("kind", "lora") == "dense":
        return passed_through(source.weights, _require(source, f"{own}.weight"), name)
    planned = passed_through(source.weights, _require(source, shared), name)
    if not expert_rank(expert, projection, layer):
        return planned

    def folded() -> Tensor:
        lora_A, lora_B = (_read(source, f"{own}.lora_{factor}.weight") for factor in "AB")
        return fold(_read(source, shared), lora_A, lora_B, expert["scale"])

    return planned._replace(make=folded, check=None)


def _planned(source: Source, gates_LKH: Tensor) -> list[Planned]:
    """Return the export's tensors in the order in which they are written."""
    form, config = TARGETS[source.target], source.config
    plan = [passed_through(source.weights, name) for name in source.weights if ".mlp." not in name]
    for layer, gate in enumerate(gates_LKH):
        block = f"model.layers.{layer}.{form.block}"
        experts = [
            _planned_expert(source, layer, number, projection, f"{block}.experts.{number}.{name}.weight")
            for number in range(len(config.experts))
            for projection, name in zip(_PROJECTIONS, form.names, strict=True)
        ]
        dtype = experts[0].dtype
        plan.append(_constant(f"{block}.gate.weight", gate, dtype))
        plan += experts
        if source.target == "qwen2_moe":
            hidden, inner = config.hidden_size, config.intermediate_size
            shared = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
            zeros = {f"shared_expert.{name}": shape for name, shape in shared.items()}
            for name, shape in {**zeros, "shared_expert_gate": (1, hidden)}.items():
                plan.append(_constant(f"{block}.{name}.weight", torch.zeros(()).expand(shape), dtype))
    return plan


def _constant(name: str, value: Tensor, dtype: str) -> Planned:
    """Return a tensor that is known already; an expanded one takes memory only when it is written."""
    return Planned(name, dtype, tuple(value.shape), lambda: value.to(getattr(torch, DTYPES[dtype])))


class Observed(NamedTuple):
    """What a model did with held-out rows."""

    loss: float
    """Nats a token."""
    chosen: list[Tensor]
    """One a layer: (routed tokens, k) expert numbers, ascending."""


@torch.no_grad()
def observe(model: "PreTrainedModel", rows: "Dataset", top_k: int, excluded: list[int]) -> Observed:
    """Run a model, ours or a native one, over tokenised rows; look at the choice in every layer.

    Args:
        excluded: token ids whose routing doesn't count, beside padding.
    """
    model.eval()
    calls: list[Tensor] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(output.topk(top_k, dim=-1).indices if isinstance(output, Tensor) else output[2])

    routers = [m for m in model.modules() if isinstance(m, ContextRouter) or type(m).__name__.endswith("TopKRouter")]
    handles = [router.register_forward_hook(record) for router in routers]
    chosen: list[list[Tensor]] = [[] for _ in routers]
    loss = tokens = 0.0
    for batch in batches(rows, _BATCH, model.device):
        batch.pop("expert", None)
        calls.clear()
        labels = int((batch["labels"][:, 1:] >= 0).sum())
        loss += float(model(**batch, use_cache=False).loss) * labels
        tokens += labels
        ids = batch["input_ids"]
        routed = batch["attention_mask"].bool() & ~torch.isin(ids, torch.tensor(excluded, device=ids.device))
        for layer, call in enumerate(calls):
            chosen[layer].append(call.reshape(*ids.shape, top_k)[routed].sort(-1).values.cpu())
    for handle in handles:
        handle.remove()
    return Observed(loss / tokens, [torch.cat(parts) for parts in chosen])


def report_on(source: Source, fitting: str, ours: Observed | None, export: Observed | None) -> dict[str, Any]:
    """Return export_report.json: what was measured, and what the format can't say."""
    notes = []
    if source.config.router_excluded_token_ids:
        notes.append(
            f"Tokens {list(source.config.router_excluded_token_ids)} go to the seed's FFN in the unified model; a "
            "native gate routes them as any other token, so that their expert's own FFN is used."
        )
    report: dict[str, Any] = {
        "format": source.target,
        "from": source.config.model_type,
        "experts": [expert["name"] for expert in source.config.experts],
        "num_experts_per_tok": source.config.num_experts_per_tok,
        "gates": fitting,
        "routing_agreement": None,
        "loss": None,
        "notes": notes,
    }
    if ours is None or export is None:
        notes.append("Nothing was measured: no proxies were given.")
        return report
    same = [
        float((mine == other).all(-1).double().mean()) for mine, other in zip(ours.chosen, export.chosen, strict=True)
    ]
    report["routing_agreement"] = {"per_layer": same, "mean": sum(same) / len(same), "tokens": len(ours.chosen[0])}
    report["loss"] = {"unified": ours.loss, "export": export.loss}
    return report
