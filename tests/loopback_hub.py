"""The least of a Hub: an HTTP server on this machine that models can be fetched from."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

SHA = "5" * 40


class _Handler(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks of one public repository at one commit."""

    repositories: dict[str, Path]
    asked: list[str]
    sent: dict[str, int]
    """File's name -> bytes of it that were sent."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        """Tell which of the asked paths there are."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        parts = unquote(urlsplit(self.path).path).split("/")
        assert parts[5] == "paths-info"
        folder = self.repositories["/".join(parts[3:5])]
        self._send(200, json.dumps([_entry(folder / p) for p in asked if (folder / p).is_file()]).encode(), True, {})

    def log_message(self, *args: object) -> None:
        """Keep quiet."""

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        kind, _, rest = path.removeprefix("/").partition("/")
        if kind == "api":
            self._api(rest, body)
            return
        name = "/".join(path.removeprefix("/datasets").split("/")[1:3])
        revision, _, file = path.split("/resolve/")[1].partition("/")
        if not (self.repositories[name] / file).is_file():
            self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            return
        content = (self.repositories[name] / file).read_bytes()
        assert revision == SHA, "every file is fetched at the pinned commit"
        etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": SHA}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            self.sent[file] = self.sent.get(file, 0) + (len(content) if body else 0)
            self._send(200, content, body, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
        self.sent[file] = self.sent.get(file, 0) + last - first + 1
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], body, headers)

    def _api(self, path: str, body: bool) -> None:
        parts = path.split("/")
        name, what = "/".join(parts[1:3]), parts[3:]
        if name not in self.repositories:
            self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
            return
        revision = what[1] if len(what) > 1 else "main"
        if revision not in ("main", SHA):
            self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
            return
        files = sorted(p for p in self.repositories[name].iterdir() if p.is_file())
        if what[:1] == ["tree"]:
            self._send(200, json.dumps([_entry(file) for file in files]).encode(), body, {})
            return
        info = {"id": name, "sha": SHA, "siblings": [{"rfilename": f.name} for f in files]}
        self._send(200, json.dumps(info).encode(), body, {"X-Repo-Commit": SHA})

    def _send(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _entry(file: Path) -> dict[str, object]:
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}


@contextmanager
def loopback_hub(repositories: dict[str, Path], sent: dict[str, int] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as `org/name` repositories; yield the address and the list of paths asked for.

    Args:
        sent: filled with how many bytes of each file were sent.
    """
    asked: list[str] = []
    sent = {} if sent is None else sent
    handler = type("Handler", (_Handler,), {"repositories": repositories, "asked": asked, "sent": sent})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
