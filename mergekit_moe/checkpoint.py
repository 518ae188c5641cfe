"""Checkpoints on disk: what safetensors headers and config.json tell, without reading a weight."""

import json
import struct
from pathlib import Path
from typing import Any

from mergekit_moe.errors import ExpertError
from mergekit_moe.workspace import digest, file_sha256

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja", "generation_config.json")
_MAX_HEADER_BYTES = 100_000_000


def read_config(folder: Path, name: str, what: str) -> dict[str, Any]:
    """Return a folder's JSON file `name`.

    Raises:
        ExpertError: if it is missing or is no JSON object.
    """
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExpertError(f"{what}: {folder} has no {name}") from None
    except ValueError:
        raise ExpertError(f"{what}: {folder / name} is not valid JSON") from None
    if not isinstance(config, dict):
        raise ExpertError(f"{what}: {folder / name} is not a JSON object")
    return config


def read_header(path: Path, what: str) -> dict[str, dict[str, Any]]:
    """Return a safetensors file's header: tensor name -> `dtype`, `shape` and `data_offsets`.

    Raises:
        ExpertError: if the file is missing, is not safetensors, or is shorter than its header says.
    """
    if not path.is_file():
        raise ExpertError(f"{what}: {path} is missing; only safetensors weights are read")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, struct.error, AttributeError, KeyError, TypeError):
        raise ExpertError(f"{what}: {path} is not a safetensors file") from None
    if size != end:
        raise ExpertError(f"{what}: {path} has {size} bytes where its header promises {end}; fetch it again")
    return header


def shards_of(folder: Path, what: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return shard name -> header for a model's folder, with every shard that the index names.

    Raises:
        ExpertError: if a shard is missing or broken, or lacks a tensor that the index puts there.
    """
    if not (folder / INDEX).is_file():
        return {WEIGHTS: read_header(folder / WEIGHTS, what)}
    weight_map: dict[str, str] = read_config(folder, INDEX, what).get("weight_map", {})
    shards: dict[str, dict[str, dict[str, Any]]] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ExpertError(f"{what}: {INDEX} names the shard {shard!r}, which is not a plain file name")
        shards[shard] = read_header(folder / shard, what)
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise ExpertError(f"{what}: {INDEX} puts {tensor} in {shard}, which doesn't have it")
    return shards


def weights_fingerprint(folder: Path, what: str) -> str:
    """Return one digest over all of a model's weight files, the same wherever they lie."""
    return digest(sorted(file_sha256(folder / shard) for shard in shards_of(folder, what)))


def identity(folder: Path, weights: str) -> str:
    """Return one digest over all that makes a base model: its weights' fingerprint, configuration, tokenizer."""
    files = [folder / "config.json", *companions(folder)]
    return digest([weights, [[f.name, file_sha256(f)] for f in files if f.is_file()]])


def companions(folder: Path) -> list[Path]:
    """Return a model's tokenizer and generation files, which a merge passes through byte for byte."""
    return sorted({file for pattern in _COMPANIONS for file in folder.glob(pattern)})


def write_index(folder: Path, shards: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Write the index that joins `shards` (file name -> header) into one checkpoint."""
    weight_map = {tensor: shard for shard, header in shards.items() for tensor in header}
    total = sum(t["data_offsets"][1] - t["data_offsets"][0] for header in shards.values() for t in header.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
