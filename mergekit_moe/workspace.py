"""Where a run's results lie: one folder a stage, complete or not there at all, skipped while nothing changed."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from mergekit_moe import __version__
from mergekit_moe.errors import WorkspaceError

MANIFEST = "manifest.json"
_INPUTS = "inputs.json"
"""In a folder that is being made: what from, so that a later run knows whether to go on with it."""
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
"""Errors that a disk or its owner make, not this program."""
_PATIENCE = timedelta(days=7)
"""How long a process waits for another; `torch.distributed` alone gives up after minutes."""
_VERSIONED = ("torch", "transformers", "peft", "sentence-transformers", "scikit-learn")


def is_main_process() -> bool:
    """True in the one process of `accelerate launch` that writes files."""
    return os.environ.get("RANK", "0") == "0"


def require_whole_models() -> None:
    """Raise WorkspaceError under a launcher that cuts models up: the main process writes what it holds itself."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise WorkspaceError(
                f"accelerate launch is configured for {name}, which spreads a model over processes, and here each "
                "needs the whole; take one of plain data parallelism, such as recipes/accelerate/four-gpus.yaml"
            )


def wait_for_everyone() -> None:
    """Let every process of `accelerate launch` arrive here before any goes on."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        process_state().wait_for_everyone()


def leave_processes() -> None:
    """Close the connections to the other processes: left to the interpreter's end, they abort it now and then."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def process_state() -> Any:
    """Return accelerate's PartialState: this process's device, and how to reach the others."""
    import torch
    from accelerate import PartialState

    # Without `cpu`, processes on a machine that has no accelerator would each believe to be alone.
    # And for as long as one of them merges or judges, the others wait.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """Return a file's sha256, read once by a run of a command: many stages ask for the same data's."""
    facts = path.stat()
    return _sha256_once(path, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


@functools.cache
def _sha256_once(path: Path, *facts: int) -> str:
    return file_sha256(path)


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make `target` the same file on disk, or a copy on another file system or one without links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Inside the block, what the disk refuses becomes a WorkspaceError that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise WorkspaceError(
            f"{folder} can't be written: {error.strerror}; make room, or choose another place"
        ) from None


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` by rename if the block ends well, and nothing if it doesn't.

    Raises:
        WorkspaceError: if `out` is there already, or can't be written.
    """
    if out.exists() or out.is_symlink():
        raise WorkspaceError(f"{out} is there already; choose another --out, or move it away")
    with disk_errors(out.parent):
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a command that was killed
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class Workspace:
    """A run's folder.

    Each stage folder holds a manifest: its inputs (recipe section, upstream digests, seed, versions) and
    the sha256 of its files. It names no path, user or machine, so it can be published as it is.
    """

    def __init__(
        self, root: Path, report: Callable[[str], None] = lambda line: None, lenders: tuple["Workspace", ...] = ()
    ) -> None:
        self.root = root
        self.report = report
        self.lenders = lenders
        """Other workspaces: a folder that one of them made from the same inputs isn't made again."""

    def folder(self, name: str) -> Path:
        return self.root / name

    def is_current(self, name: str, inputs: dict[str, Any]) -> bool:
        """True if the stage's folder was made from exactly these inputs and still has its files."""
        folder = self.folder(name)
        if is_main_process():
            _restore(folder)
        manifest = _manifest(folder)
        if manifest is None or manifest["inputs"] != self._complete(inputs):
            return False
        return all(
            (folder / file).is_file() and (folder / file).stat().st_size == facts["size"]
            for file, facts in manifest["outputs"].items()
        )

    def build(
        self,
        name: str,
        inputs: dict[str, Any],
        make: Callable[[Path], dict[str, str] | None],
        *,
        resumable: bool = False,
    ) -> Path:
        """Return the stage's folder, made anew by `make(folder)` unless it is current.

        It is made under a temporary name and renamed when whole: a killed run leaves the old folder or
        none. All processes of `accelerate launch` run `make`; the main one moves the folder.

        Args:
            make: fills the folder; may return the sha256 of files that it knows from writing them.
            resumable: True if `make` goes on with what a killed run left; it is given that, if it was made from the
                same inputs. An error leaves it, too.

        Raises:
            WorkspaceError: if something that is no stage folder of ours stands in the way.
        """
        folder = self.folder(name)
        partial = folder.with_name(f".{folder.name}.partial")
        if self.is_current(name, inputs):
            self.report(f"{name}: up to date")
            if is_main_process():
                shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            wait_for_everyone()
            return folder
        self.require_free(name)
        for lender in self.lenders:
            if lender.is_current(name, inputs):
                self._borrow(lender.folder(name), folder, partial)
                return folder
        self.report(f"{name}: building")
        if is_main_process():
            goes_on = resumable and _read_if_there(partial / _INPUTS) == self._complete(inputs)
            with disk_errors(self.root):
                if not goes_on:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
                if resumable:
                    write_json(partial / _INPUTS, self._complete(inputs))
        wait_for_everyone()
        with contextlib.ExitStack() as if_it_fails, disk_errors(self.root):
            if is_main_process() and not resumable:
                if_it_fails.callback(shutil.rmtree, partial, ignore_errors=True)
            known = make(partial)
            wait_for_everyone()
            if is_main_process():
                (partial / _INPUTS).unlink(missing_ok=True)
                _write_manifest(partial, self._complete(inputs), known or {})
                _replace(folder, partial)
            if_it_fails.pop_all()
        wait_for_everyone()
        return folder

    def _borrow(self, lent: Path, folder: Path, partial: Path) -> None:
        """Make `folder` what `lent` is, by hard links where possible."""
        self.report(f"{folder.name}: as in {lent.parent}")
        if is_main_process():
            with disk_errors(self.root):
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(lent, partial, copy_function=link_or_copy)
                _replace(folder, partial)
        wait_for_everyone()

    def require_free(self, name: str) -> None:
        """Raise WorkspaceError if something that is no stage folder of ours stands where `name` would go."""
        folder = self.folder(name)
        if self.root.exists() and not self.root.is_dir():
            raise WorkspaceError(f"{self.root} is not a folder; choose another --workspace")
        if folder.exists() and _manifest(folder) is None and (not folder.is_dir() or any(folder.iterdir())):
            raise WorkspaceError(
                f"{folder} is not empty and was not made by mergekit_moe; choose another --workspace, or move it away"
            )

    def digest_of(self, name: str, command: str, files: tuple[str, ...] = ()) -> str:
        """Return the digest of an upstream stage's outputs, or of those of its files that matter.

        Raises:
            WorkspaceError: if that stage hasn't run; `command` says what would run it.
        """
        manifest = _manifest(self.folder(name))
        if manifest is None:
            raise WorkspaceError(
                f"{self.folder(name)} does not exist yet; run `metamoe {command}` on this recipe first"
            )
        outputs = manifest["outputs"]
        return digest({file: facts["sha256"] for file, facts in outputs.items() if not files or file in files})

    def _complete(self, inputs: dict[str, Any]) -> dict[str, Any]:
        versions = {package: metadata.version(package) for package in _VERSIONED}
        return _as_stored({**inputs, "versions": {"mergekit_moe": __version__, **versions}})


def _as_stored(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs as they come back from JSON, so that what is compared is what is stored."""
    return json.loads(json.dumps(inputs))


def _read_if_there(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _manifest(folder: Path) -> Any:
    manifest = _read_if_there(folder / MANIFEST)
    return manifest if isinstance(manifest, dict) and {"inputs", "outputs"} <= manifest.keys() else None


def _write_manifest(folder: Path, inputs: dict[str, Any], known: dict[str, str]) -> None:
    outputs = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        outputs[name] = {"size": path.stat().st_size, "sha256": known.get(name) or file_sha256(path)}
    write_json(folder / MANIFEST, {"inputs": inputs, "outputs": outputs})


def _replace(folder: Path, partial: Path) -> None:
    """Put `partial` in the place of `folder`: two renames, and never a moment with half a folder.

    Who is killed between the two finds the old folder under its temporary name: `_restore` puts it back.
    """
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _restore(folder: Path) -> None:
    """Undo half a replacement."""
    old = folder.with_name(f".{folder.name}.old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)
