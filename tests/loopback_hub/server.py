"""The sockets: requests in, answers out, each damaged as the faults say."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from loopback_hub.answers import Answer, Request, answer
from loopback_hub.faults import Fault, flipped
from loopback_hub.store import Hub


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *args: object) -> None:
        """Keep quiet."""

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        # Not decoded: a revision such as refs%2Fpr%2F1 is one part of the path.
        request = Request(self.command, parts.path, parse_qs(parts.query), dict(self.headers.items()), self._body())
        path = unquote(parts.path)
        with self.hub.lock:
            self.hub.asked.append(path)
            self.hub.log.append(f"{self.command} {path}")
            fault = self.hub.fault_for(self.command, path)
        if fault is not None and fault.kind == "slow":
            time.sleep(fault.seconds)
        if fault is not None and fault.kind == "garble":
            request = request._replace(body=flipped(request.body))
        if fault is not None and fault.kind == "drop":
            self.close_connection = True
            return
        if fault is not None and fault.kind == "status":
            self._send(Answer(fault.status, b"<html>not now</html>", fault.headers), fault)
            return
        with self.hub.lock:
            said = answer(self.hub, request)
        self._send(said, fault)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, said: Answer, fault: Fault | None) -> None:
        body, kind = said.body, fault.kind if fault is not None else ""
        if kind == "lose":
            self.close_connection = True
            return
        if kind == "flip":
            body = flipped(body)
        try:
            self.send_response(said.status)
            for key, value in {"Content-Length": str(len(body)), **said.headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if kind == "truncate" else body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client had enough


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Serve a Hub; yield its address.

    Large files lie behind a second address, as on the real one, where they are on another host.
    """
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.address, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub.address
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
