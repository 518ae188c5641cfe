"""Are downloaded files what the Hub says they are? huggingface_hub compares their sizes, not their bytes."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from mergekit_moe.hub.asking import RefusalError, ask
from mergekit_moe.workspace import file_sha256


def listed_files(source: str, sha: str, kind: str = "model") -> dict[str, str]:
    """Return path -> digest of a repository's files at a commit: sha256 of large files, git's blob sha1 of others.

    Raises:
        RefusalError: if the Hub doesn't tell.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def look() -> dict[str, str]:
        entries = HfApi().list_repo_tree(source, recursive=True, revision=sha, repo_type=kind)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return {file.path: file.lfs.sha256 if file.lfs is not None else file.blob_id for file in files}

    return ask(look, revision=sha)


def digest_like(path: Path, stated: str) -> str:
    """Return a file's digest of the kind that `stated` is."""
    if len(stated) == 64:
        return file_sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def cached_digest(path: Path) -> str | None:
    """Return the digest that the Hub gave for a file in the cache, by whose name it lies there; None if none did."""
    blob = path.resolve()
    return blob.name if path.is_symlink() and blob.parent.name == "blobs" else None


def require_intact(folder: Path, stated: dict[str, str]) -> None:
    """Compare a snapshot's files with their digests; the first that differs is thrown away, so that it comes anew.

    Raises:
        RefusalError: if a file is another one, or missing; the text ends a sentence on the repository.
    """
    for name, digest in sorted(stated.items()):
        path = folder / name
        if not path.is_file():
            raise RefusalError(f"lacks {name} in the cache; fetch it again: run the same command once more", down=True)
        found = digest_like(path, digest)
        if found != digest:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise RefusalError(
                f"came with a damaged {name}: its digest is {found[:12]} where the Hub says {digest[:12]}; it is "
                "deleted from the cache, fetch it again: run the same command once more"
            )


def require_intact_cache(folder: Path, files: Iterable[str]) -> None:
    """The same without the Hub, by what it said when the files were fetched."""
    stated = {name: cached_digest(folder / name) for name in files}
    require_intact(folder, {name: digest for name, digest in stated.items() if digest is not None})
