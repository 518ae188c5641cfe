"""What the tests of merging share: experts and merged models from folders, without a recipe."""

from pathlib import Path
from typing import Any

from mergekit_moe.experts import Base, Expert, read_base, read_expert
from mergekit_moe.hub import Resolved
from mergekit_moe.merging.unify import merge_experts
from mergekit_moe.recipe import Merge, Router


def base_of(folder: Path) -> Base:
    return read_base(Resolved(folder, "base", None))


def read(base: Path, folder: Path, name: str = "law", **settings: Any) -> Expert:
    return read_expert(name, Resolved(folder, name, None), base_of(base), **settings)


def merge(base: Path, experts: list[Expert], out: Path, router: Router | None = None, **settings: Any) -> Path:
    out.mkdir()
    merge_experts(base_of(base), experts, Merge(**settings), router or Router(), out=out)
    return out
