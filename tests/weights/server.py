"""Local web server for weights, with failures on request."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Served:
    """File on the server. The entries of `cut` and the following fields are consumed: each response takes the first."""

    content: bytes
    etag: str | None = '"1"'
    cut: list[int] = field(default_factory=list)  # bytes after which an answer breaks off
    statuses: list[int] = field(default_factory=list)  # answers before the file is given
    headers: dict[str, str] = field(default_factory=dict)
    hold: threading.Event | None = None  # the body waits for it


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None


class Server:
    """Files by path, and the received requests."""

    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        self.requests: list[Request] = []
        self.url = ""

    def gets(self, path: str) -> list[str | None]:
        """Return the headers `Range` of all requests for a file's content."""
        return [request.range for request in self.requests if request.method == "GET" and request.path == path]


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server on a free port, in a thread."""
    server = Server()

    class Handler(_Handler):
        state = server

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.state.requests.append(Request(self.command, path, self.headers.get("Range")))
        served = self.state.files.get(path)
        if served is None or served.statuses:
            status, about = (404, {}) if served is None else (served.statuses.pop(0), served.headers)
            self._headers(status, 0, about)
            return
        start, wanted = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted:
            start = int(wanted[1])
        if start > len(served.content) or (start and start == len(served.content)):
            self._headers(416, 0, {"Content-Range": f"bytes */{len(served.content)}"})
            return
        about = dict(served.headers) | ({"ETag": served.etag} if served.etag else {})
        given = served.content[start:]
        if start:
            about["Content-Range"] = f"bytes {start}-{start + len(given) - 1}/{len(served.content)}"
        self._headers(206 if start else 200, len(given), about)
        if with_body:
            self._body(served, given)

    def _headers(self, status: int, length: int, about: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in about.items():
            self.send_header(name, value)
        self.end_headers()

    def _body(self, served: Served, content: bytes) -> None:
        limit = served.cut.pop(0) if served.cut else len(content)
        self.wfile.write(content[: limit // 2])
        self.wfile.flush()
        if served.hold is not None:
            served.hold.wait(30)
        self.wfile.write(content[limit // 2 : limit])
        self.close_connection = limit < len(content)
