"""Experts on the Hub for a base model, each confirmed by its own files: configs and the weights' headers."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_moe.errors import ExpertError, HubError
from mergekit_moe.experts import PROXIES, Base, read_base, read_expert
from mergekit_moe.hub.asking import RefusalError, ask
from mergekit_moe.hub.downloads import CONFIGS, resolve_model

_RELATIONS = ("adapter", "finetune")
"""What an expert can be to its base, in the Hub's words."""


class Found(NamedTuple):
    """A repository that says that it is an expert of the base model."""

    source: str
    relation: str
    sha: str | None
    kind: str | None
    """What is published, in words, rank included; None for what can't be merged."""
    license: str | None
    downloads: int
    proxies: bool
    """Whether it comes with proxies, so that a router can learn its domain."""
    problem: str | None
    """Why it can't be merged; None if it can."""


def find_experts(base: str, revision: str | None = None, *, limit: int = 20) -> tuple[str, list[Found]]:
    """Return the base's sha, and what the Hub lists for it, the most downloaded first; no weights are fetched.

    What an expert's tokenizer says is left to `metamoe check`, which fetches it.

    Args:
        base: the base model's Hub id.
        limit: how many repositories to look at, adapters and fine-tunes together.

    Raises:
        HubError: if the Hub doesn't list them.
        ExpertError: if the base model isn't to be had.
    """
    resolved = resolve_model(base, revision, Path("/nowhere"), "BASE", weights=False, files=CONFIGS)
    model = read_base(resolved)
    listed = sorted(_listed(base, limit), key=lambda entry: (-entry[1].downloads, entry[1].id))
    return str(resolved.revision), [_confirm(info, relation, model) for relation, info in listed[:limit]]


def _listed(base: str, limit: int) -> list[tuple[str, Any]]:
    """Return (relation, what the Hub says of it) of each repository that names the base model."""
    from huggingface_hub import HfApi

    def look(relation: str) -> list[Any]:
        tag = f"base_model:{relation}:{base}"
        return list(itertools.islice(HfApi().list_models(filter=tag, sort="downloads", limit=limit), limit))

    try:
        return [(relation, info) for relation in _RELATIONS for info in ask(lambda: look(relation))]  # noqa: B023
    except RefusalError as refusal:
        raise HubError(f"experts of {base}: {refusal}") from None


def _confirm(info: Any, relation: str, base: Base) -> Found:
    """Read a repository as a merge would, without its weights."""
    found = Found(info.id, relation, info.sha, None, _license(info), info.downloads or 0, False, None)
    try:
        files = [*CONFIGS, PROXIES]
        source = resolve_model(info.id, info.sha, Path("/nowhere"), info.id, weights=False, files=files)
        found = found._replace(sha=source.revision, proxies=(source.folder / PROXIES).is_file())
        expert = read_expert(info.id, source, base)
        return found._replace(kind=expert.kind, license=expert.license or found.license)
    except ExpertError as error:
        return found._replace(problem=_brief(str(error), info.id))


def _brief(problem: str, source: str) -> str:
    """Return an error without the name that the table gives already."""
    return problem.removeprefix(f"expert '{source}': ").removeprefix(f"{source}: ")


def _license(info: Any) -> str | None:
    """Return the licence that the Hub shows, from the card."""
    tags = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    return tags[0] if tags else None
