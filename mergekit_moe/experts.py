"""Published experts: a plain PEFT LoRA adapter, its proxies and its routing statistics, in one folder."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_moe.architectures import architecture_of
from mergekit_moe.checkpoint import read_config, read_header
from mergekit_moe.errors import ExpertError

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PROXIES = "proxies.json"
STATISTICS = "routing_statistics.safetensors"
ABOUT = "expert.json"

_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.(?P<projection>\w+)\.lora_(?P<factor>[AB])\.weight")
# What a merge of factored experts can't carry yet, and the value that each may have.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "init_lora_weights": (True, False, "gaussian", None),
    "alora_invocation_tokens": (None, []),
}


class Expert(NamedTuple):
    """One published LoRA expert, checked against its base from headers alone."""

    name: str
    folder: Path
    source: str
    revision: str | None
    ranks: dict[str, int]
    """Projection -> rank; a projection that the adapter leaves alone is not in it."""
    scale: float
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    about: dict[str, Any]
    """The folder's expert.json; empty for an adapter that wasn't published by mergekit_moe."""

    @property
    def license(self) -> str | None:
        return self.about.get("license")


def read_expert(
    name: str, folder: Path, *, source: str, revision: str | None, base_config: dict[str, Any], base_weights: str | None
) -> Expert:
    """Return the expert in `folder`, checked against the base model.

    Args:
        base_config: the base model's config.json.
        base_weights: fingerprint of the base's weights, or None to skip that check.

    Raises:
        ExpertError: naming the expert, the file, and what doesn't fit.
    """
    what = f"expert '{name}'"
    config = read_config(folder, ADAPTER_CONFIG, what)
    _require_plain_lora(config, what)
    ranks = _ranks(read_header(folder / ADAPTER, what), base_config, what)
    about = read_config(folder, ABOUT, what) if (folder / ABOUT).is_file() else {}
    trained_on = str(about.get("base_weights", base_weights))
    if base_weights is not None and trained_on != base_weights:
        raise ExpertError(
            f"{what}: it was trained on another base model than the recipe's (weights {trained_on[:12]} against "
            f"{base_weights[:12]}, {ABOUT}); use the same base_model, or drop the expert"
        )
    rank = max(ranks.values())
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float):
        raise ExpertError(f"{what}: {ADAPTER_CONFIG} has lora_alpha = {alpha!r}; it must be a number")
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    return Expert(name, folder, source, revision, ranks, scale, about)


def lora_key(path: str, projection: str, factor: str) -> str:
    """Return PEFT's name of a LoRA matrix; `factor` is A or B."""
    return f"base_model.model.{path}.{projection}.lora_{factor}.weight"


def read_proxies(folder: Path, name: str) -> dict[str, Any]:
    """Return an expert's published proxies: the pool's fingerprint, and row numbers and ids.

    Raises:
        ExpertError: if there are none, or the file is not of that form.
    """
    if not (folder / PROXIES).is_file():
        raise ExpertError(
            f"expert '{name}': {folder} has no {PROXIES}, so the router can't learn its domain; "
            "publish the expert with `metamoe publish`, let the recipe pick them (`proxies: expert-gain`), or drop it"
        )
    proxies = read_config(folder, PROXIES, f"expert '{name}'")
    if not _is_proxies(proxies):
        raise ExpertError(f"expert '{name}': {folder / PROXIES} is not what `metamoe publish` writes; publish it again")
    return proxies


def _is_proxies(proxies: dict[str, Any]) -> bool:
    pool, rows = proxies.get("pool"), proxies.get("rows")
    if (
        not isinstance(pool, dict)
        or not isinstance(rows, list)
        or not {"fingerprint", "sources", "rows"} <= pool.keys()
    ):
        return False
    return all(isinstance(row, int) and 0 <= row < pool["rows"] for row in rows)


def _require_plain_lora(config: dict[str, Any], what: str) -> None:
    if config.get("peft_type") != "LORA":
        raise ExpertError(
            f"{what}: {ADAPTER_CONFIG} says peft_type {config.get('peft_type')!r}; only LORA can be merged"
        )
    for field, allowed in _PLAIN.items():
        if field in config and config[field] not in allowed:
            raise ExpertError(
                f"{what}: {ADAPTER_CONFIG} has {field} = {config[field]!r}, which can't be merged yet; "
                "only plain LoRA can"
            )


def _ranks(header: dict[str, Any], base_config: dict[str, Any], what: str) -> dict[str, int]:
    """Return each projection's rank; every tensor of the adapter is accounted for."""
    architecture = architecture_of(base_config, "base_model")
    sizes = architecture.sizes(base_config)
    expected_paths = {architecture.ffn.format(layer=i) for i in range(base_config["num_hidden_layers"])}
    ranks: dict[str, int] = {}
    seen: set[tuple[str, str, str]] = set()
    for key, tensor in header.items():
        match = _KEY.fullmatch(key)
        if match is None or match["projection"] not in sizes or match["path"] not in expected_paths:
            raise ExpertError(
                f"{what}: {ADAPTER} holds {key}, which is no FFN projection of the base "
                f"({len(expected_paths)} layers, {', '.join(sizes)}); "
                "only FFN adapters of the recipe's base can be merged"
            )
        projection, factor, shape = match["projection"], match["factor"], tensor["shape"]
        if len(shape) != 2:
            raise ExpertError(f"{what}: {key} has shape {shape}; a LoRA matrix has two dimensions")
        rank = shape[0] if factor == "A" else shape[1]
        side = 0 if factor == "A" else 1
        given, wanted = shape[1 - side], sizes[projection][side]
        if given != wanted:
            field = "intermediate_size" if wanted == base_config["intermediate_size"] else "hidden_size"
            raise ExpertError(
                f"{what}: {key} was trained for {field} {given}, the recipe's base has {wanted}; "
                "use the same base_model, or drop the expert"
            )
        if ranks.setdefault(projection, rank) != rank:
            raise ExpertError(
                f"{what}: {projection} has rank {ranks[projection]} in one layer and {rank} in "
                "another, which can't be merged yet"
            )
        seen.add((match["path"], projection, factor))
    missing = [
        lora_key(path, projection, factor)
        for path in sorted(expected_paths)
        for projection in ranks
        for factor in "AB"
        if (path, projection, factor) not in seen
    ]
    if not ranks or missing:
        raise ExpertError(
            f"{what}: {ADAPTER} lacks {missing[0] if missing else 'any LoRA matrix'}; "
            "every layer's FFN must have its own"
        )
    return ranks
