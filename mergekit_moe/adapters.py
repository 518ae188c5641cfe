"""PEFT adapters: what each of their tensors does to which tensor of the base, told from config and header alone.

Nothing is guessed: a field or a tensor that isn't known here ends the reading with its name.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from mergekit_moe.errors import ExpertError
from mergekit_moe.updates import Update
from mergekit_moe.weights import Weights

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(?P<path>.+?)(\.base_layer)?\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(\.weight)?|weight|bias)"
)
# Fields that a merge heeds, or that only matter while an adapter is trained or loaded.
_HEEDED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "lora_bias"),
    *("modules_to_save", "target_modules", "layers_to_transform", "layers_pattern", "exclude_modules"),
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version"),
    *("lora_dropout", "runtime_config", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of ways to start, which is checked by itself
    # Only Conv1D weights lie the other way round, and no family here has them; PEFT ignores it for linear layers.
    "fan_in_fan_out",
}
_DEFAULT_ALPHA = 8
"""PEFT's own, where a config doesn't say."""
_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)
"""Values of `init_lora_weights` that leave the base as it is."""


def require_exact_lora(config: dict[str, Any], what: str) -> None:
    """Raise ExpertError, naming the field, for an adapter that isn't a LoRA which can be merged exactly."""
    if config.get("peft_type") != "LORA":
        raise ExpertError(
            f"{what}: {ADAPTER_CONFIG} says peft_type {config.get('peft_type')!r}; only LORA can be merged"
        )
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise ExpertError(
            f"{what}: {ADAPTER_CONFIG} has init_lora_weights = {start!r}, which changes the base's own weights; "
            "convert it with PEFT's `path_initial_model_for_weight_conversion`, or publish it merged, as a fine-tune"
        )
    for field, value in config.items():
        if field not in _HEEDED | {"init_lora_weights"} and value not in (None, False, [], {}):
            raise ExpertError(
                f"{what}: {ADAPTER_CONFIG} has {field} = {value!r}, a variant of LoRA that can't be merged; publish "
                "the expert merged, as a full fine-tune"
            )
    alphas = [config.get("lora_alpha", _DEFAULT_ALPHA), *_pattern(config, "alpha_pattern", what).values()]
    for alpha in alphas:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ExpertError(f"{what}: {ADAPTER_CONFIG} has lora_alpha = {alpha!r}; it must be a number")


def updates_of_adapter(
    weights: Weights,
    config: dict[str, Any],
    base: Weights,
    base_config: dict[str, Any],
    what: str,
    *,
    own_name: Callable[[str], str] = lambda name: name,
    is_free: Callable[[str], bool] = lambda name: False,
) -> dict[str, Update]:
    """Return the base's tensors that an adapter changes, by name, and how.

    Args:
        weights: the adapter's own.
        config: its adapter_config.json.
        base: the base model's weights.
        base_config: its config.json, or the part of it that names the sizes.
        own_name: gives what the base calls a tensor that the adapter may know by another name.
        is_free: tells a head that needn't fit the base: one that it ties to its embedding, or over other labels.

    Raises:
        ExpertError: naming the tensor that is missing, of another size, or of no known meaning.
    """
    parts: dict[str, dict[str, str]] = {}
    for key in weights:
        match = _KEY.fullmatch(key)
        if match is None:
            raise ExpertError(f"{what}: {ADAPTER} holds {key}, which is no tensor of a LoRA adapter")
        parts.setdefault(match["path"], {})[match["part"].removesuffix(".weight")] = key
    found: dict[str, Update] = {}
    for path, keys in parts.items():
        updates = _updates_of_module(path, keys, weights, config, what)
        found.update({own_name(name): update for name, update in updates.items()})
    for name, update in found.items():
        if not is_free(name):
            _require_fit(name, update, base, base_config, what)
    return found


def scale_of(config: dict[str, Any], path: str, rank: int) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA, of the module at `path`; patterns heeded as PEFT does."""
    patterns = config.get("alpha_pattern") or {}
    fitting = [alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)]
    alpha = float(fitting[0] if fitting else config.get("lora_alpha", _DEFAULT_ALPHA))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _updates_of_module(
    path: str, keys: dict[str, str], weights: Weights, config: dict[str, Any], what: str
) -> dict[str, Update]:
    """Return what one module's tensors do to its weight and its bias."""
    found: dict[str, Update] = {}
    factors = [keys.get(f"lora_{factor}") or keys.get(f"lora_embedding_{factor}") for factor in "AB"]
    if any(factors):
        lora_A, lora_B = factors
        if lora_A is None or lora_B is None:
            missing = _PREFIX + path + (".lora_A.weight" if lora_A is None else ".lora_B.weight")
            raise ExpertError(f"{what}: {ADAPTER} lacks {missing}; every A needs its B")
        for key in (lora_A, lora_B):
            if len(weights.shape(key)) != 2:
                raise ExpertError(
                    f"{what}: {key} has shape {list(weights.shape(key))}; a LoRA matrix has two dimensions"
                )
        rank = weights.shape(lora_A)[0]
        if rank == 0 or weights.shape(lora_B)[1] != rank:
            raise ExpertError(f"{what}: {lora_A} has rank {rank} and {lora_B} has {weights.shape(lora_B)[1]}")
        found[f"{path}.weight"] = Update(
            weights,
            whole=keys.get("weight"),
            lora_A=lora_A,
            lora_B=lora_B,
            scale=scale_of(config, path, rank),
            magnitude=keys.get("lora_magnitude_vector"),
            turned="lora_embedding_A" in keys,
        )
    elif "weight" in keys:
        found[f"{path}.weight"] = Update(weights, whole=keys["weight"])
    if config.get("use_dora") and any(factors) and "lora_magnitude_vector" not in keys:
        raise ExpertError(f"{what}: {ADAPTER} lacks {_PREFIX}{path}.lora_magnitude_vector, which DoRA needs")
    if "bias" in keys:
        found[f"{path}.bias"] = Update(weights, whole=keys["bias"])
    if "lora_B.bias" in keys and "lora_A" in keys:
        scale = scale_of(config, path, weights.shape(keys["lora_A"])[0])
        found[f"{path}.bias"] = Update(weights, whole=keys.get("bias"), shift=keys["lora_B.bias"], scale=scale)
    return found


def _require_fit(name: str, update: Update, base: Weights, base_config: dict[str, Any], what: str) -> None:
    """Raise ExpertError unless the update is of a tensor of the base, and of its size."""
    key = update.shift or update.lora_A or update.whole or ""
    if name not in base:
        module = name.rpartition(".")[0]
        if name.endswith(".bias") and f"{module}.weight" in base:
            raise ExpertError(f"{what}: {ADAPTER} holds {key}, a bias, and the base's {module} has none")
        raise ExpertError(
            f"{what}: {ADAPTER} holds {key}, and the base has no {name}; use the base model that it was trained on, or "
            "drop the expert"
        )
    wanted = base.shape(name)
    given: dict[str, tuple[int, ...]] = {}
    if update.whole is not None:
        given[update.whole] = update.weights.shape(update.whole)
    if update.shift is not None:
        given[update.shift] = update.weights.shape(update.shift)
    if update.magnitude is not None:
        # One norm a row; of an embedding, one a column.
        size = update.weights.shape(update.magnitude)[-1]
        given[update.magnitude] = (wanted[0], size) if update.turned else (size, *wanted[1:])
    for factor, side in ((update.lora_A, 1), (update.lora_B, 0)):
        if factor is not None:
            # A says only how many go in, B only how many come out; an embedding's factors are turned.
            place = 1 - side if update.turned else side
            size = update.weights.shape(factor)[side]
            given[factor] = tuple(size if i == place else length for i, length in enumerate(wanted))
    for tensor, shape in given.items():
        if shape != wanted:
            raise ExpertError(
                f"{what}: {tensor} was trained for {_sizes(shape, wanted, base_config)}; use the same base_model, or "
                "drop the expert"
            )


def _sizes(given: tuple[int, ...], wanted: tuple[int, ...], base_config: dict[str, Any]) -> str:
    """Return a size and what it should be, by the config's name for it where it has one."""
    fields = {base_config.get(field): field for field in ("vocab_size", "intermediate_size", "hidden_size")}
    for mine, right in zip(given, wanted, strict=False):
        if mine != right and right in fields:
            return f"{fields[right]} {mine}, the recipe's base has {right}"
    return f"the shape {list(given)}, the recipe's base has {list(wanted)}"


def _pattern(config: dict[str, Any], field: str, what: str) -> dict[str, Any]:
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise ExpertError(f"{what}: {ADAPTER_CONFIG} has {field} = {pattern!r}; it must be a mapping")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise ExpertError(
                f"{what}: {ADAPTER_CONFIG} has the {field} {key!r}, no regular expression: {error}"
            ) from None
    return pattern
