"""Upload a folder that metamoe made to the Hub: in one commit, whole or not at all, and nothing that isn't ours."""

import fnmatch
import getpass
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_moe import __version__
from mergekit_moe.adapters import ADAPTER, ADAPTER_CONFIG
from mergekit_moe.checkpoint import INDEX, license_of, read_config
from mergekit_moe.errors import HubError
from mergekit_moe.experts import ABOUT, PROXIES, STATISTICS
from mergekit_moe.hub.asking import LOG_IN, RefusalError, ask
from mergekit_moe.hub.downloads import commit_of
from mergekit_moe.hub.verifying import digest_like, listed_files
from mergekit_moe.privacy.ledger import LEDGER
from mergekit_moe.workspace import MANIFEST, file_sha256

_CARD = "README.md"
_CHECKPOINT = (
    *("config.json", "generation_config.json", "*.safetensors", INDEX, _CARD, MANIFEST),
    *("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.jinja"),
    *("preprocessor_config.json", "processor_config.json"),
)
_POOLING = ("modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "[0-9]_*/config.json")
"""Of a text encoder, as sentence-transformers reads it."""
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "expert": ((ADAPTER, ADAPTER_CONFIG, ABOUT), (PROXIES, STATISTICS, LEDGER, _CARD, MANIFEST)),
    "native model": (("config.json", "export_report.json"), _CHECKPOINT),
    "merged model": (
        ("config.json", "merge.json"),
        (*_CHECKPOINT, "*_metamoe.py", "router_training.json", *_POOLING),
    ),
    "seed model": (("config.json", "model.safetensors", MANIFEST), _CHECKPOINT),
    "proxy set": (("proxies.jsonl", _CARD), (MANIFEST,)),
    "proxy set of images": (("proxies.parquet", _CARD), (MANIFEST,)),
}
"""What may be pushed -> the files by which it is known, and the others that it may have."""
_PRIVATE_INPUTS = {"private", "held_out", "embeddings", "gains"}
"""In the manifest of a folder that stays with the client."""


class Pushed(NamedTuple):
    """Where a folder lies now."""

    url: str
    sha: str
    """Of the repository's head, which holds the folder."""
    is_new: bool
    """False if the head held it already."""


class _Upload(NamedTuple):
    """What is to be pushed where."""

    repository: str
    kind: str
    files: dict[str, Path]
    message: str
    digests: dict[tuple[str, int], str]
    """(name, length of the digest) -> digest, of files that were read already."""

    @property
    def repo_type(self) -> str:
        """In the Hub's words."""
        return "dataset" if self.kind.startswith("proxy set") else "model"

    def head(self) -> str:
        """Return the sha of the repository's head."""
        return commit_of(self.repository, kind=self.repo_type)

    def address(self, sha: str) -> str:
        """Return where one may look at a commit."""
        from huggingface_hub import constants

        above = "datasets/" if self.repo_type == "dataset" else ""
        return f"{constants.ENDPOINT}/{above}{self.repository}/commit/{sha}"

    def is_like(self, name: str, stated: str) -> bool:
        """True if the file is the one that the Hub states the digest of."""
        key = name, len(stated)
        if key not in self.digests:
            self.digests[key] = digest_like(self.files[name], stated)
        return self.digests[key] == stated


def files_to_push(folder: Path, tell: Callable[[str], None] = lambda line: None) -> tuple[str, dict[str, Path]]:
    """Return what a folder is, and name -> path of the files that would be uploaded.

    Args:
        tell: is given a sentence about a file that stays here.

    Raises:
        HubError: if it is no folder that metamoe makes for others, or holds anything besides.
    """
    if not folder.is_dir():
        raise HubError(
            f"{folder} is not a folder; give one that metamoe made, such as experts/<name>, proxy-sets/<name> or model"
        )
    files = {path.name: path for path in sorted(folder.iterdir()) if not _holds_pooling(path)}
    files |= {str(path.relative_to(folder)): path for path in sorted(folder.glob(_POOLING[-1]))}
    kind = next((kind for kind, (marks, _) in _KINDS.items() if all(mark in files for mark in marks)), None)
    if kind is None:
        known = "; ".join(f"{kind} ({', '.join(marks)})" for kind, (marks, _) in _KINDS.items())
        raise HubError(f"{folder} is nothing that can be pushed; known by their files are: {known}")
    for name, path in files.items():
        _require_ours(path, name, kind)
    if license_of(folder) == "unknown":
        raise HubError(
            f"{folder / _CARD} states no licence, and nothing is published without one; set it in the recipe "
            "(card.license, an expert's license, the license of a public_pool), and make the folder again"
        )
    if not _manifest_is_public(folder, files):
        del files[MANIFEST]
        tell(f"note: {MANIFEST} stays here: it names a path, a user or a machine")
    return kind, files


def push(
    folder: Path,
    repository: str,
    *,
    public: bool = False,
    message: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Upload a folder in one commit; what the repository has of it already is not uploaded again.

    Args:
        repository: `org/name` or `user/name`; made if it isn't there.
        public: True to let anybody see it; a repository that is there already must be so.
        message: of the commit.
        tell: is given a line about each thing that is done.

    Raises:
        HubError: if the folder isn't one to push, the Hub doesn't take it, or somebody else changed the repository
            meanwhile. The repository's head is then the old commit, or a whole one.
    """
    from huggingface_hub import get_token

    kind, files = files_to_push(folder, tell)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise HubError(f"{repository} is no name of a repository; give org/name")
    if get_token() is None:
        raise HubError(f"{repository} can't be written without a token; {LOG_IN}")
    upload = _Upload(repository, kind, files, message or f"Upload {kind} with metamoe {__version__}", {})
    try:
        _require_repository(upload, public, tell)
        return _upload(upload, tell)
    except RefusalError as refusal:
        raise HubError(f"{repository} {refusal}") from None


def _holds_pooling(path: Path) -> bool:
    """Whether it is a folder with nothing in it but how an encoder pools."""
    files = [] if path.is_symlink() or not path.is_dir() else list(path.iterdir())
    return [fnmatch.fnmatchcase(f"{path.name}/{file.name}", _POOLING[-1]) for file in files] == [True]


def _require_ours(path: Path, name: str, kind: str) -> None:
    """Raise HubError for what a folder of this kind doesn't hold when metamoe made it."""
    marks, others = _KINDS[kind]
    if path.is_symlink():
        raise HubError(f"{path} is a link, and what it leads to may be anything; put the file itself there")
    if not path.is_file():
        raise HubError(f"{path} is a folder, and what is pushed as '{kind}' has none; move it away")
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in (*marks, *others)):
        allowed = ", ".join((*marks, *others))
        raise HubError(f"{path} is none of the files that are pushed as '{kind}': {allowed}; move it away")
    if path.suffix in (".json", ".md") and path.name not in ("tokenizer.json", MANIFEST):
        text = path.read_text(encoding="utf-8", errors="replace")
        for place in (str(Path.home()), str(path.parent.resolve().parent)):
            if len(place) > 2 and re.search(re.escape(place) + r"(?![\w-])", text):
                raise HubError(f"{path} names a folder of this machine; take that out before it is published")


def _manifest_is_public(folder: Path, files: dict[str, Path]) -> bool:
    """True for a manifest that may be published, and where there is none.

    Raises:
        HubError: if it says that the folder stays here, or weights aren't those that it was written for.
    """
    if MANIFEST not in files:
        return True
    manifest = read_config(folder, MANIFEST, "push")
    inputs, outputs = manifest.get("inputs"), manifest.get("outputs")
    if not isinstance(inputs, dict) or not isinstance(outputs, dict) or inputs.keys() & _PRIVATE_INPUTS:
        raise HubError(
            f"{files[MANIFEST]} is of a folder that isn't made to be published; push experts/<name> or model"
        )
    for name, path in files.items():
        if path.suffix == ".safetensors" and name in outputs and file_sha256(path) != outputs[name].get("sha256"):
            raise HubError(f"{path} isn't what {MANIFEST} says that it was when it was made; make the folder again")
    here = {name for name in (_user(), socket.gethostname()) if name}
    return not any(_names_a_place(text, here) for text in _strings(manifest))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container without an entry for it
        return ""


def _names_a_place(text: str, here: set[str]) -> bool:
    return text in here or re.search(r"(^|[\s\"'=:(])(/|~|[A-Za-z]:\\|\.\.?/)", text) is not None


def _strings(value: Any) -> Iterable[str]:
    """Yield every string of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _require_repository(upload: _Upload, public: bool, tell: Callable[[str], None]) -> None:
    """Make the repository unless it is there; it must be seen by those by whom it is meant to be seen."""
    from huggingface_hub import HfApi

    repository, made = upload.repository, {"repo_type": upload.repo_type, "private": not public, "exist_ok": True}
    try:
        private = _is_private(upload)
    except RefusalError as refusal:
        if not refusal.absent:
            raise
        ask(lambda: HfApi().create_repo(repository, **made))  # type: ignore[arg-type]
        tell(f"made {repository}, {'public' if public else 'private'}")
        private = _is_private(upload)
    if private == public:
        seen = "private" if private else "public"
        remedy = "leave --public out" if private else "give --public"
        raise HubError(f"{repository} is {seen}; {remedy} if that is right, or change it in its settings on the Hub")


def _is_private(upload: _Upload) -> bool:
    from huggingface_hub import HfApi

    return bool(ask(lambda: HfApi().repo_info(upload.repository, repo_type=upload.repo_type).private))


def _upload(upload: _Upload, tell: Callable[[str], None]) -> Pushed:
    """Bring the head to hold the files; a commit whose bytes were damaged on the way is mended by one more."""
    first = head = upload.head()
    for _ in range(2):
        changed, stale = _differences(upload, head)
        if not changed and not stale:
            return Pushed(upload.address(head), head, head != first)
        tell(f"uploading {len(changed)} of {len(upload.files)} files" + (f", deleting {len(stale)}" if stale else ""))
        head = _commit(upload, changed, stale, parent=head)
    if any(_differences(upload, head)):
        raise HubError(f"{upload.repository} holds other bytes at {head[:7]} than were sent; push again")
    return Pushed(upload.address(head), head, True)


def _differences(upload: _Upload, sha: str) -> tuple[list[str], list[str]]:
    """Return names of files that a commit lacks or has otherwise, and of weights there that are none of the folder's.

    Loaders would read those: `model.safetensors` before an index of shards.
    """
    listed = listed_files(upload.repository, sha, upload.repo_type)
    changed = [name for name in upload.files if name not in listed or not upload.is_like(name, listed[name])]
    weights = [name for name in listed if name.endswith(".safetensors") or name == INDEX]
    return changed, [name for name in weights if "/" not in name and name not in upload.files]


def _commit(upload: _Upload, changed: list[str], stale: list[str], *, parent: str) -> str:
    """Make one commit on top of `parent`, and no second one where only the answer was lost; return its sha."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    additions = [CommitOperationAdd(name, str(upload.files[name])) for name in changed]
    deletions = [CommitOperationDelete(name, is_folder=False) for name in stale]
    tries = 0

    def send() -> str:
        nonlocal tries
        tries += 1
        if tries > 1 and (head := upload.head()) != parent:
            if any(_differences(upload, head)):
                raise _changed(upload.repository)
            return head
        made = HfApi().create_commit(
            upload.repository,
            [*additions, *deletions],
            commit_message=upload.message,
            repo_type=upload.repo_type,
            parent_commit=parent,
        )
        return str(made.oid)

    try:
        return ask(send)
    except RefusalError as refusal:
        if refusal.status in (409, 412):
            raise _changed(upload.repository) from None
        raise


def _changed(repository: str) -> HubError:
    return HubError(
        f"{repository} was changed by somebody else while this was being uploaded, and nothing of it was published; "
        "look at the repository, then push again"
    )
