"""Model hub on this machine: downloads as from the real one, with a redirect to where large files lie, and uploads."""

from __future__ import annotations

import base64
import hashlib
import json
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
TOKEN = "hf_of_this_hub"


class HubServer:
    """Files of a hub by their path, such as `datasets/owner/name/resolve/main/a.json.gz`, and what was asked for.

    Attributes:
        files: content by path.
        requests: method and path of every request for a file.
        sent: bytes of files that were sent.
        cut: bytes after which the connection of a download breaks; None for never.
        cards: front matters that a client wanted to have checked.
        created: settings of the repositories that were created.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.sent = 0
        self.cut: int | None = None
        self.cards: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.large: dict[str, bytes] = {}
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
        if self.path.startswith("/api/models/"):
            self._reply({"id": "/".join(self.path.split("/")[3:5]), "sha": COMMIT, "siblings": []})
        else:
            self._answer(with_body=True)

    def do_PUT(self) -> None:
        self.server_hub.large[self.path.removeprefix("/lfs/")] = self._body()
        self._reply({})

    def do_POST(self) -> None:
        hub, body, path = self.server_hub, self._body(), self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._reply({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._reply({"url": f"{hub.endpoint}/owner/name", "name": "owner/name"})
        elif path == "/api/validate-yaml":
            hub.cards.append(json.loads(body)["content"])
            self._reply({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            self._reply(
                {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}
            )
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{hub.endpoint}/lfs/{one['oid']}"}} for one in objects]
            self._reply({"objects": [{**one, "actions": two} for one, two in zip(objects, actions, strict=True)]})
        elif "/commit/" in path:
            self._commit(path.split("/"), body)
        else:
            self._reply({}, 404)

    def _commit(self, parts: list[str], body: bytes) -> None:
        """Take the files of a commit to `/api/models/OWNER/NAME/commit/REVISION`."""
        hub, folder = self.server_hub, f"{parts[3]}/{parts[4]}/resolve/{parts[6]}"
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.files[f"{folder}/{value['path']}"] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[f"{folder}/{value['path']}"] = hub.large[value["oid"]]
        self._reply({"commitUrl": f"{hub.endpoint}/owner/name/commit/{COMMIT}", "commitOid": COMMIT})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _reply(self, value: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

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
        content = hub.files.get(path.removeprefix("cdn/").replace(f"/resolve/{COMMIT}/", "/resolve/main/"))
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
