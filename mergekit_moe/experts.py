"""Published experts: a PEFT adapter or a full fine-tune, its proxies and its routing statistics, in one folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_moe.adapters import ADAPTER, ADAPTER_CONFIG, require_exact_lora, updates_of_adapter
from mergekit_moe.architectures import CLASSIFIER, Architecture, architecture_of
from mergekit_moe.checkpoint import Header, license_of, pooling_of, read_config, shards_of
from mergekit_moe.errors import ExpertError
from mergekit_moe.hub import Resolved
from mergekit_moe.structure import canonical, differing_fields
from mergekit_moe.updates import Update
from mergekit_moe.weights import Weights

PROXIES = "proxies.json"
STATISTICS = "routing_statistics.safetensors"
ABOUT = "expert.json"

# Fields that everything is counted by.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
_HEADS = ("lm_head.weight", "embed_out.weight")
_IGNORED_TENSORS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias", "embeddings.position_ids")
"""Buffers that older checkpoints hold, and that every class computes for itself."""


class Base(NamedTuple):
    """The model that all experts started from, known by its config and headers."""

    source: Resolved
    config: dict[str, Any]
    weights: Weights

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.config, "base_model")

    @property
    def sized(self) -> dict[str, Any]:
        """The part of the config that tells of the layers that take experts."""
        return self.architecture.sized(self.config)

    @property
    def layers(self) -> int:
        return self.sized["num_hidden_layers"]

    def is_tied(self, name: str) -> bool:
        """True for a head that is the embedding once more, whether it is stored or not."""
        return self.ties and name in _HEADS

    @property
    def ties(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", self.architecture.tied))

    def is_of_head(self, name: str) -> bool:
        """True for a tensor of a classifier's head, or of the pooler that a model has only without one."""
        pooler = self.architecture.pooler
        return name in CLASSIFIER or (pooler is not None and name.startswith(f"{pooler}."))

    def blocks(self) -> list[str]:
        """Return the path of every layer's FFN."""
        return [self.architecture.ffn.format(layer=layer) for layer in range(self.layers)]

    def ffn_weights(self) -> list[str]:
        """Return the name of every FFN matrix, layer by layer."""
        return [f"{block}.{name}.weight" for block in self.blocks() for name in self.architecture.projections]

    def is_ffn(self, name: str) -> bool:
        """True for a weight or bias of a layer's FFN."""
        before, _, after = self.architecture.ffn.partition("{layer}")
        layer, _, projection = name.removeprefix(before).rpartition(".")[0].partition(after + ".")
        return name.startswith(before) and layer.isdigit() and projection in self.architecture.projections


class Expert(NamedTuple):
    """One published expert, checked against its base from headers alone."""

    name: str
    folder: Path
    source: str
    revision: str | None
    is_adapter: bool
    """A LoRA adapter, not a whole model."""
    updates: dict[str, Update]
    """Name of a tensor of the base -> what the expert makes of it; the others are the base's own."""
    untied: tuple[str, ...]
    """Heads that it trained apart from the embedding, to which the base ties them: no merge can keep that."""
    about: dict[str, Any]
    """The folder's expert.json; empty for an expert that wasn't published by mergekit_moe."""
    labels: tuple[str, ...] = ()
    """Of an image classifier's own head, a row each."""
    head: dict[str, Update] = {}
    """That head's tensors."""

    @property
    def license(self) -> str | None:
        """As published with it; None where nothing says."""
        stated = self.about.get("license") or license_of(self.folder)
        return None if stated == "unknown" else stated

    @property
    def kind(self) -> str:
        """What was published, in words."""
        if not self.is_adapter:
            return "full fine-tune"
        ranks = sorted({update.rank for update in self.updates.values() if update.rank})
        dora = any(update.magnitude for update in self.updates.values())
        spread = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0] if ranks else 0}"
        return f"{'DoRA' if dora else 'LoRA'}, rank {spread}"


def read_base(source: Resolved) -> Base:
    """Return a base model, from its config and headers.

    Raises:
        ExpertError: naming the file and what is wrong with it.
    """
    what = "base_model"
    config = read_config(source.folder, "config.json", what)
    architecture = architecture_of(config, what)
    _require_unquantised(config, what)
    config = _with_sizes(config, architecture, what)
    if architecture.encoder and not architecture.images:
        pooling_of(source.folder, what)
    ties = config.get("tie_word_embeddings", architecture.tied)
    shards = {}
    for shard, header in shards_of(source.folder, what, lambda shard: source.header(shard, what)).items():
        kept = (name for name in header if not name.endswith(_IGNORED_TENSORS) and not (ties and name in _HEADS))
        shards[shard] = {architecture.current_name(name): header[name] for name in kept}
    weights = Weights(source.folder, shards, what)
    base = Base(source, config, weights)
    for block in base.blocks():
        for projection, (inputs, outputs) in architecture.sizes(config).items():
            name = f"{block}.{projection}.weight"
            if name not in weights:
                remedy = "save it without a head" if architecture.encoder else "save the whole model, with its head"
                raise ExpertError(f"{what}: {source.folder} lacks {name}; {remedy}")
            if weights.shape(name) != (outputs, inputs):
                raise ExpertError(
                    f"{what}: {name} has shape {list(weights.shape(name))} where config.json says [{outputs}, {inputs}]"
                )
    return base


def _with_sizes(config: dict[str, Any], architecture: Architecture, what: str) -> dict[str, Any]:
    """Return a config.json that names the sizes of the layers that take experts.

    Raises:
        ExpertError: naming the field that is no size.
    """
    fields, tower = _SIZES[:3] if architecture.images else _SIZES, architecture.tower
    if tower is not None and not all(field in architecture.sized(config) for field in fields):
        config = {**config, tower: canonical(config, what)[tower]}  # a part is written without what is the default
    sized = architecture.sized(config)
    for field in fields:
        if not isinstance(sized.get(field), int) or sized[field] < 1:
            named = field if tower is None else f"{tower}.{field}"
            raise ExpertError(f"{what}: config.json has {named} = {sized.get(field)!r}; it must be a whole number")
    return config


def read_expert(
    name: str,
    source: Resolved,
    base: Base,
    *,
    base_weights: Callable[[], str] | None = None,
    same_base: bool = False,
) -> Expert:
    """Return the expert at `source`, checked against the base model from configs and headers.

    Args:
        base_weights: gives the fingerprint of the base's weights, for experts that name theirs; None skips that check.
        same_base: the user vouches that the base model that the expert names is the recipe's.

    Raises:
        ExpertError: naming the expert, the file, and what doesn't fit.
    """
    what, folder = f"expert '{name}'", source.folder
    about = read_config(folder, ABOUT, what) if (folder / ABOUT).is_file() else {}
    trained_on = about.get("base_weights")
    if base_weights is not None and trained_on is not None and trained_on != base_weights():
        raise ExpertError(
            f"{what}: it was trained on another base model than the recipe's (weights {str(trained_on)[:12]} against "
            f"{base_weights()[:12]}, {ABOUT}); use the same base_model, or drop the expert"
        )
    silent = about.get("domain_free_token_ids", [])
    if not isinstance(silent, list) or not all(isinstance(token, int) for token in silent):
        raise ExpertError(f"{what}: {ABOUT} has domain_free_token_ids = {silent!r}; it must be a list of token ids")
    _require_same_vocabulary(folder, base.source.folder, what)
    vouched = same_base or (base_weights is not None and trained_on is not None)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise ExpertError(
            f"{what}: {folder} has neither {ADAPTER_CONFIG}, of an adapter, nor config.json, of a whole model"
        )
    labels = _labels_of(about, base, what)
    if is_adapter:
        read = _read_adapter(source, base, what, vouched, labels)
    else:
        read = _read_fine_tune(source, base, what, labels)
    head = {name: read.pop(name) for name in CLASSIFIER if labels and name in read}
    _require_head(head, labels, base, what)
    updates = {name: update for name, update in read.items() if name in base.weights}
    untied = tuple(name for name in read if name not in updates)
    return Expert(name, folder, source.public_name, source.revision, is_adapter, updates, untied, about, labels, head)


def _labels_of(about: dict[str, Any], base: Base, what: str) -> tuple[str, ...]:
    """Return the labels of an expert's own head, as its expert.json names them; none where the family has no head.

    Raises:
        ExpertError: if they are no list of different names.
    """
    labels = about.get("labels", []) if base.architecture.body else []
    named = isinstance(labels, list) and all(isinstance(label, str) and label for label in labels)
    if not named or len(set(labels)) < len(labels):
        raise ExpertError(f"{what}: {ABOUT} has labels = {labels!r}; it must be a list of different names")
    return tuple(labels)


def _require_head(head: dict[str, Update], labels: tuple[str, ...], base: Base, what: str) -> None:
    """Raise ExpertError unless a head has a row for each label."""
    sizes = {"classifier.weight": (len(labels), base.sized["hidden_size"]), "classifier.bias": (len(labels),)}
    for name in sizes if labels else ():
        whole = head[name].whole if name in head and head[name].lora_A is None else None
        given = None if whole is None else head[name].weights.shape(whole)
        if given != sizes[name]:
            raise ExpertError(
                f"{what}: its {len(labels)} labels need {name} of shape {list(sizes[name])}, and it has "
                f"{'none' if given is None else list(given)}; save it whole (PEFT: modules_to_save)"
            )


def require_keepable(expert: Expert, what: str) -> None:
    """Raise ExpertError for an expert that untied its head from the embedding, where that can't be left out.

    Args:
        what: the recipe's choice that needs it, such as "merge.other_weights average".
    """
    if expert.untied:
        raise ExpertError(
            f"expert '{expert.name}': it trained {expert.untied[0]} apart from the embedding, to which the base ties "
            f"it, and {what} needs all that was changed; choose merge.other_weights base, or drop the expert"
        )


def require_ffn_change(expert: Expert, base: Base) -> None:
    """Raise ExpertError for an expert that leaves every FFN as it was."""
    if not any(base.is_ffn(name) for name in expert.updates):
        whose = "" if base.architecture.tower is None else " of the image tower"
        raise ExpertError(
            f"expert '{expert.name}': it changes no FFN{whose}, which is what the experts of a MoE are; use "
            "merge.method soup, or drop it"
        )


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


def _read_adapter(
    source: Resolved, base: Base, what: str, same_base: bool, labels: tuple[str, ...]
) -> dict[str, Update]:
    config = read_config(source.folder, ADAPTER_CONFIG, what)
    require_exact_lora(config, what)
    if not same_base:
        _require_same_base(config, base.source, what)
    header: Header = source.header(ADAPTER, what)
    weights = Weights(source.folder, {ADAPTER: header}, what)
    if not labels:
        _require_known_head(weights, base, what)
    updates = updates_of_adapter(
        weights,
        config,
        base.weights,
        base.sized,
        what,
        own_name=base.architecture.current_name,
        is_free=lambda name: base.is_tied(name) or (bool(labels) and name in CLASSIFIER),
    )
    if not updates:
        raise ExpertError(f"{what}: {ADAPTER} lacks any LoRA matrix; publish a trained adapter, or drop the expert")
    _require_every_layer(config, updates, base, what)
    return updates


def _require_known_head(weights: Weights, base: Base, what: str) -> None:
    """Raise ExpertError for a head over other labels than the base's, where nothing says which."""
    for key in weights:
        if base.architecture.body and key.endswith(".classifier.weight"):
            own = base.weights.shape(CLASSIFIER[0])[0] if CLASSIFIER[0] in base.weights else 0
            if weights.shape(key)[0] != own:
                raise ExpertError(
                    f"{what}: it trained a head of {weights.shape(key)[0]} labels, the base has {own}, and nothing "
                    f"says which they are; write their names in order as a list `labels` into its {ABOUT}"
                )


def _require_every_layer(config: dict[str, Any], updates: dict[str, Update], base: Base, what: str) -> None:
    """Raise ExpertError for an adapter that lacks a layer which its own config means: it is a smaller model's."""
    targets = config.get("target_modules")
    restricted = [config.get(field) for field in ("layers_to_transform", "layers_pattern")]
    excluded = config.get("exclude_modules")
    if excluded not in (None, [], list(base.architecture.namesakes)):
        return
    if not isinstance(targets, list | str) or any(part not in (None, []) for part in restricted):
        return
    for block in base.blocks():
        for projection in base.architecture.projections:
            module = f"{block}.{projection}"
            if isinstance(targets, str):
                meant = targets == base.architecture.lora_targets["target_modules"]
            else:
                meant = any(module == target or module.endswith(f".{target}") for target in targets)
            if meant and f"{module}.weight" not in updates:
                raise ExpertError(
                    f"{what}: {ADAPTER} lacks base_model.model.{module}.lora_A.weight, which its target_modules mean, "
                    f"and the base has {base.layers} layers; use the base model that it was trained on"
                )


def _require_same_base(config: dict[str, Any], base: Resolved, what: str) -> None:
    """Raise ExpertError if adapter and recipe name different repositories, or commits of one."""
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if (
        base.revision is None
        or not isinstance(named, str)
        or named.count("/") != 1
        or named.startswith((".", "/", "~"))
    ):
        return  # one of them is a folder, whose name says nothing
    remedy = "use that one, or say `same_base: true` if you know that they are the same"
    if named.lower() != base.source.lower():
        raise ExpertError(
            f"{what}: {ADAPTER_CONFIG} says that its base model is {named}, the recipe's is {base.source}; {remedy}"
        )
    if isinstance(revision, str) and len(revision) == len(base.revision) and revision != base.revision:
        raise ExpertError(
            f"{what}: {ADAPTER_CONFIG} says that its base model is {named} at {revision[:7]}, the recipe's is at "
            f"{base.revision[:7]}; {remedy}"
        )


def _read_fine_tune(source: Resolved, base: Base, what: str, labels: tuple[str, ...]) -> dict[str, Update]:
    config = read_config(source.folder, "config.json", what)
    _require_unquantised(config, what)
    different = differing_fields(config, base.config, what)
    if different:
        raise ExpertError(
            f"{what}: its config.json differs from the base's: {', '.join(different)}; use a fine-tune of the recipe's "
            "base_model, or drop the expert"
        )
    shards = shards_of(source.folder, what, lambda shard: source.header(shard, what))
    named = base.architecture.current_name
    weights = Weights(
        source.folder, {shard: {named(name): header[name] for name in header} for shard, header in shards.items()}, what
    )
    # A head of its own has other labels than the base's, and stands where the base may have a pooler instead.
    own = [name for name in CLASSIFIER if labels and name in weights]
    shared = [name for name in base.weights if not labels or not base.is_of_head(name)]
    for name in weights:
        known = name in base.weights or name in own or base.is_tied(name)
        if not known and not name.endswith(_IGNORED_TENSORS):
            raise ExpertError(
                f"{what}: it holds {name}, which the base doesn't have; use a fine-tune of the recipe's base"
            )
    for name in shared:
        if name not in weights:
            raise ExpertError(f"{what}: it lacks {name}, which the base has; save the whole model")
        if weights.shape(name) != base.weights.shape(name):
            raise ExpertError(
                f"{what}: {name} has shape {list(weights.shape(name))}, the base's has {list(base.weights.shape(name))}"
            )
    return {name: Update(weights, whole=name) for name in (*shared, *own)}


def _require_unquantised(config: dict[str, Any], what: str) -> None:
    if config.get("quantization_config"):
        raise ExpertError(
            f"{what}: config.json has a quantization_config, and quantised weights can't be merged; give the model in "
            "bfloat16, float16 or float32"
        )


def _require_same_vocabulary(folder: Path, base: Path, what: str) -> None:
    """Raise ExpertError if the expert brings a tokenizer that gives tokens other numbers than the base's does."""
    files = [place / "tokenizer.json" for place in (folder, base)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    own, right = (_vocabulary(read_config(file.parent, file.name, what)) for file in files)
    # Tokens that an expert has beyond the base's have no row in its embedding, and matter to nobody.
    other = sorted(str(token) for token, number in right.items() if own.get(token) != number)
    if other:
        raise ExpertError(
            f"{what}: its tokenizer.json gives {len(other)} of the base's {len(right)} tokens another number or none, "
            f"the first of them {other[0]!r}; use an expert with the base's own tokenizer"
        )


def _vocabulary(tokenizer: dict[str, Any]) -> dict[Any, Any]:
    """Return token -> number of a tokenizer.json, added tokens included."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # unigram models: [token, score], the place is the number
        found: dict[Any, Any] = {
            json.dumps(entry[:1]): number for number, entry in enumerate(vocab) if isinstance(entry, list)
        }
    else:
        found = dict(vocab) if isinstance(vocab, dict) else {}
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict):
            found[str(token.get("content"))] = token.get("id")
    return found
