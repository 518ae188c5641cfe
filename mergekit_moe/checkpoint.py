"""Checkpoints on disk: what safetensors headers and config.json tell, without reading a weight."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mergekit_moe.errors import ExpertError
from mergekit_moe.workspace import digest, file_sha256

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
REPORT = "merge.json"
"""In a merged model: what it was made from, and what became of it."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Either says how an image becomes numbers."""
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja"),
    "generation_config.json",
    *PROCESSORS,
    # How sentence-transformers makes one vector of a text.
    *("modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "[0-9]_*/config.json"),
)
_MODULES = "modules.json"
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""A flag of older 1_Pooling/config.json -> the `pooling_mode` that newer ones name."""
_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_HEADER_BYTES = 100_000_000
_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64},
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4},
}
"""The format's types -> bits an element."""

Header = dict[str, dict[str, Any]]
"""Tensor name -> `dtype`, `shape`, `data_offsets`."""


def read_config(folder: Path, name: str, what: str) -> dict[str, Any]:
    """Return a folder's JSON file `name`.

    Raises:
        ExpertError: if it is missing or is no JSON object.
    """
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExpertError(f"{what}: {folder} has no {name}") from None
    except (ValueError, RecursionError):
        raise ExpertError(f"{what}: {folder / name} is not valid JSON") from None
    except OSError as error:
        raise ExpertError(f"{what}: {folder / name} can't be read: {error.strerror}") from None
    if not isinstance(config, dict):
        raise ExpertError(f"{what}: {folder / name} is not a JSON object")
    return config


def read_header(path: Path, what: str) -> Header:
    """Return a safetensors file's header: tensor name -> `dtype`, `shape` and `data_offsets`.

    Raises:
        ExpertError: if the file is missing, is not safetensors, or is shorter than its header says.
    """
    if not path.is_file():
        raise ExpertError(f"{what}: {path} is missing; {_only_safetensors(path.parent)}")
    _require_inside(path, what)
    with path.open("rb") as file:
        start = file.read(8)
        length = header_length(start, path.stat().st_size, f"{what}: {path}")
        return parse_header(file.read(length), path.stat().st_size, f"{what}: {path}")


def header_length(start: bytes, size: int, where: str) -> int:
    """Return how many bytes of header follow a safetensors file's first eight.

    Args:
        start: those eight.
        size: the whole file's, in bytes.
        where: how an error names the file.

    Raises:
        ExpertError: if the file can't hold so long a header.
    """
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
        raise ExpertError(f"{where} is not a safetensors file")
    return length


def parse_header(text: bytes, size: int, where: str) -> Header:
    """Return a header, every tensor of it checked: its type, and that it lies where its shape says.

    Args:
        text: the header's JSON.
        size: the whole file's, in bytes.

    Raises:
        ExpertError: if it isn't a header, or the file isn't as long as it says.
    """
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = 0
        for tensor in sorted(header.values(), key=lambda tensor: tensor["data_offsets"]):
            first, last = tensor["data_offsets"]
            bits = _BITS[tensor["dtype"]] * math.prod(tensor["shape"])
            if first != end or bits != 8 * (last - first) or any(length < 0 for length in tensor["shape"]):
                raise ValueError
            end = last
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise ExpertError(f"{where} is not a safetensors file") from None
    if size != 8 + len(text) + end:
        raise ExpertError(f"{where} has {size} bytes where its header promises {8 + len(text) + end}; fetch it again")
    return header


def shards_of(folder: Path, what: str, header: Callable[[str], Header] | None = None) -> dict[str, Header]:
    """Return shard name -> header for a model's folder, with every shard that the index names.

    Args:
        header: reads a shard's header, where the weights themselves lie elsewhere.

    Raises:
        ExpertError: if a shard is missing or broken, or lacks a tensor that the index puts there.
    """
    header = header or (lambda shard: read_header(folder / shard, what))
    if not (folder / INDEX).is_file() or (folder / WEIGHTS).is_file():  # a whole file wins, as in the library
        return {WEIGHTS: header(WEIGHTS)}
    weight_map = read_config(folder, INDEX, what).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ExpertError(f"{what}: {folder / INDEX} has no weight_map from tensors to shards; fetch it again")
    shards: dict[str, Header] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ExpertError(f"{what}: {INDEX} names the shard {shard!r}, which is not a plain file name")
        shards[shard] = header(shard)
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise ExpertError(f"{what}: {INDEX} puts {tensor} in {shard}, which doesn't have it")
    return shards


def _require_inside(path: Path, what: str) -> None:
    """Raise ExpertError for a link that leads out of the model's own folder; the Hub's cache links into its blobs."""
    if not path.is_symlink():
        return
    folder, target = path.parent.resolve(), path.resolve()
    cached = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if folder not in target.parents and cached not in target.parents:
        raise ExpertError(f"{what}: {path} is a link out of its folder; put the file itself there")


def _only_safetensors(folder: Path) -> str:
    others = [file.name for pattern in _UNSAFE for file in folder.glob(pattern)]
    if others:
        return f"{sorted(others)[0]} is not read, since pickles can run code: save the model as safetensors"
    return "only safetensors weights are read"


def weights_fingerprint(folder: Path, what: str) -> str:
    """Return one digest over all of a model's weight files, the same wherever they lie."""
    return digest(sorted(file_sha256(folder / shard) for shard in shards_of(folder, what)))


def stamp(folder: Path, what: str) -> str:
    """Return one digest of the sizes and times of change of a model's weight files: it reads their headers alone."""
    files = [(folder / shard).stat() for shard in sorted(shards_of(folder, what))]
    return digest([[file.st_size, file.st_mtime_ns] for file in files])


def identity(folder: Path, weights: str) -> str:
    """Return one digest over all that makes a base model: its weights' fingerprint, configuration, tokenizer."""
    files = [folder / "config.json", *companions(folder)]
    return digest([weights, [[str(f.relative_to(folder)), file_sha256(f)] for f in files if f.is_file()]])


def companions(folder: Path) -> list[Path]:
    """Return a model's tokenizer, image processor, generation and pooling files: a merge copies them byte for byte."""
    return sorted({file for pattern in _COMPANIONS for file in folder.glob(pattern)})


def pooling_of(folder: Path, what: str) -> str:
    """Return how a text encoder's token states become one vector: `mean`, also where nothing says, or `cls`.

    Raises:
        ExpertError: if sentence-transformers would do anything else with them.
    """
    if not (folder / _MODULES).is_file():
        return "mean"
    try:
        modules = json.loads((folder / _MODULES).read_text(encoding="utf-8"))
        kinds = {module["type"].rpartition(".")[2]: folder / module["path"] for module in modules}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ExpertError(f"{what}: {folder / _MODULES} is not what sentence-transformers writes") from None
    if others := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
        raise ExpertError(
            f"{what}: {_MODULES} has a {others[0]} module; allowed are Transformer, Pooling and Normalize"
        )
    if "Pooling" not in kinds:
        raise ExpertError(f"{what}: {_MODULES} has no Pooling module, so that a text has no one vector")
    config = read_config(kinds["Pooling"], "config.json", what)
    modes = [mode for key, mode in _POOLINGS.items() if config.get(key)] or [str(config.get("pooling_mode"))]
    if modes not in (["mean"], ["cls"]):
        raise ExpertError(
            f"{what}: {kinds['Pooling'].name}/config.json pools by {', '.join(modes)}; allowed are mean and cls"
        )
    return modes[0]


def license_of(folder: Path) -> str:
    """Return the licence that a model folder's card states, or 'unknown'."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---\n"):
        return "unknown"
    try:
        metadata = yaml.safe_load(text.split("---\n", 2)[1])
    except yaml.YAMLError:
        return "unknown"
    stated = metadata.get("license") if isinstance(metadata, dict) else None
    return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated or "unknown")


def write_index(folder: Path, shards: dict[str, Header]) -> None:
    """Write the index that joins `shards` (file name -> header) into one checkpoint."""
    weight_map = {tensor: shard for shard, header in shards.items() for tensor in header}
    total = sum(t["data_offsets"][1] - t["data_offsets"][0] for header in shards.values() for t in header.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
