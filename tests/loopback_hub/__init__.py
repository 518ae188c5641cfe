"""A Hub on this machine: an HTTP server that huggingface_hub, transformers, peft and datasets talk to for real.

`store.py` is what it keeps (repositories, commits, tokens), `answers.py` what it says to which request, `faults.py` how
it can be made to fail, `server.py` the sockets. Point HF_ENDPOINT at it, and set HF_HUB_DISABLE_XET=1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopback_hub.faults import Fault
from loopback_hub.server import serve
from loopback_hub.store import Hub, Repository

__all__ = ["SHA", "Fault", "Hub", "Repository", "loopback_hub", "serve"]

SHA = "5" * 40
"""The one commit of a repository that `loopback_hub` serves."""


@contextmanager
def loopback_hub(repositories: dict[str, Path], sent: dict[str, int] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as public `org/name` repositories, models and data sets alike, of one commit each.

    Yields the address and the list of paths asked for.

    Args:
        sent: filled with how many bytes of each file were sent.
    """
    hub = Hub()
    if sent is not None:
        hub.sent = sent
    for name, folder in repositories.items():
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        for kind in ("model", "dataset"):
            hub.add(name, files, kind=kind, sha=SHA)
    with serve(hub) as address:
        yield address, hub.asked
