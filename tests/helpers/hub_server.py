"""Model hub on this machine: downloads as from the real one, with a redirect to where large files lie."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" + 34 * "0"


class HubServer:
    """Files of a hub by their path, such as `datasets/owner/name/resolve/main/a.json.gz`, and what was asked for.

    Attributes:
        files: content by path.
        requests: method and path of every request for a file.
        sent: bytes of files that were sent.
        cut: bytes after which the connection of a download breaks; None for never.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.sent = 0
        self.cut: int | None = None
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop to listen; a second call does nothing."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    """Answer of the hub: a redirect with the facts of a file, and the file itself where the redirect leads."""

    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def end_headers(self) -> None:
        # No connection outlives `stop`.
        self.send_header("Connection", "close")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def _answer(self, with_body: bool) -> None:
        hub, path = self.server_hub, self.path.lstrip("/").partition("?")[0]
        # The client may ask for more than files, such as a list of tools that use it.
        if "/resolve/" in path:
            hub.requests.append(f"{self.command} {path}")
        content = hub.files.get(path.removeprefix("cdn/"))
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif not path.startswith("cdn/"):
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/cdn/{path}")  # type: ignore[attr-defined]
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(content, with_body)

    def _send(self, content: bytes, with_body: bool) -> None:
        hub, wanted = self.server_hub, self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if with_body:
            body = content[start : hub.cut]
            self.wfile.write(body)
            hub.sent += len(body)
            if hub.cut is not None:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serve_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Context with a hub that this process takes for the real one, and a folder as the hub's cache."""
    hub = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        hub.stop()
