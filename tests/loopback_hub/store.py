"""What the loopback Hub keeps: repositories with their commits, large files by their sha256, and who may do what."""

import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loopback_hub.faults import Fault

_LARGE = (".safetensors", ".bin", ".png", ".npy", ".parquet", ".arrow")


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, bytes]
    """Path -> content, of the whole repository."""


@dataclass
class Repository:
    """A repository of models or data sets; its last commit is the head of `main`."""

    name: str
    kind: str = "model"
    private: bool = False
    gated: bool = False
    downloads: int = 0
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, Commit] = field(default_factory=dict)
    """Branches beside main, such as the Hub's own `refs/convert/parquet`."""

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        """Return the commit that a revision stands for; None if there is none."""
        if revision in ("main", "refs/heads/main"):
            return self.head
        if revision in self.refs:
            return self.refs[revision]
        return next((commit for commit in [*self.commits, *self.refs.values()] if commit.sha == revision), None)

    def commit(self, files: dict[str, bytes], title: str, sha: str | None = None) -> Commit:
        """Append a commit that holds exactly these files."""
        entries = "".join(f"{path} {oid(path, content)}\n" for path, content in sorted(files.items()))
        history = f"{self.kind} {self.name} {len(self.commits)} {title}\n{entries}"
        made = Commit(sha or hashlib.sha1(history.encode()).hexdigest(), title, dict(files))
        self.commits.append(made)
        return made

    def branch(self, ref: str, files: dict[str, bytes]) -> Commit:
        """Make a branch of one commit that holds exactly these files."""
        main, self.commits = self.commits, []
        self.refs[ref] = self.commit(files, ref)
        self.commits = main
        return self.refs[ref]

    @property
    def metadata(self) -> dict[str, Any]:
        """What the card's front matter says."""
        return front_matter(self.head.files.get("README.md", b"").decode()) or {}

    @property
    def tags(self) -> list[str]:
        """What the Hub makes of card and files; `list_models` filters by these."""
        card = self.metadata
        bases = card.get("base_model", [])
        bases = [bases] if isinstance(bases, str) else bases
        guess = "adapter" if "adapter_config.json" in self.head.files else "merge" if len(bases) > 1 else "finetune"
        relation = card.get("base_model_relation", guess)
        tags = [tag for base in bases for tag in (f"base_model:{base}", f"base_model:{relation}:{base}")]
        return [*card.get("tags", []), *tags, *([f"license:{card['license']}"] if "license" in card else [])]


@dataclass
class User:
    """Who a token stands for."""

    name: str
    orgs: tuple[str, ...] = ()
    """Organisations whose repositories they see and write."""
    may_write: bool = True
    gates: tuple[str, ...] = ()
    """Gated repositories that let them in."""

    def owns(self, repository: str) -> bool:
        return repository.split("/")[0] in (self.name, *self.orgs)


class Hub:
    """All of it, and a record of what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        """sha256 -> content of files that were uploaded by LFS."""
        self.users: dict[str, User] = {}
        """Token -> user."""
        self.faults: list[Fault] = []
        self.asked: list[str] = []
        """Paths, without the method."""
        self.log: list[str] = []
        """`METHOD path` of each request."""
        self.sent: dict[str, int] = {}
        """File's name -> bytes of it that were sent."""
        self.address = self.cdn = ""
        self.lock = threading.RLock()

    def add(
        self, name: str, files: dict[str, bytes], *, kind: str = "model", sha: str | None = None, **facts: Any
    ) -> Repository:
        """Add a repository of one commit."""
        repository = Repository(name, kind, **facts)
        repository.commit(files, "first", sha)
        for path, content in files.items():
            if is_large(path):
                self.large[hashlib.sha256(content).hexdigest()] = content
        self.repositories[kind, name] = repository
        return repository

    def add_folder(self, name: str, folder: Path, **facts: Any) -> Repository:
        """Add a folder's files as a repository of one commit."""
        return self.add(name, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}, **facts)

    def model(self, name: str) -> Repository:
        return self.repositories["model", name]

    def fault_for(self, method: str, path: str) -> Fault | None:
        return next((fault for fault in self.faults if fault.strikes(method, path)), None)


def is_large(path: str) -> bool:
    """True for files that go by LFS."""
    return path.endswith(_LARGE)


def oid(path: str, content: bytes) -> str:
    """Return what a file is known by: the sha256 of large ones, git's blob sha1 of others."""
    return hashlib.sha256(content).hexdigest() if is_large(path) else git_sha1(content)


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def front_matter(card: str) -> dict[str, Any] | None:
    """Return the metadata of a card; None if it has none, or none that can be read."""
    if not card.startswith("---\n"):
        return None
    try:
        found = yaml.safe_load(card.split("---\n", 2)[1])
    except yaml.YAMLError:
        return None
    return found if isinstance(found, dict) else None
