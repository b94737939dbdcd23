"""A local HTTP server with as much of the Hugging Face Hub's protocol as downloads need, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """One repository with one commit. `token`: only requests that carry it get files."""

    files: dict[str, bytes]
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    branches: tuple[str, ...] = ("main",)
    token: str | None = None


@dataclass
class Hub:
    """What the server serves and has seen. `cut`: file name -> no byte from there on ever arrives.

    Ids of `repos` are owner/name for models and datasets/owner/name for datasets.
    """

    repos: dict[str, Repo]
    cut: dict[str, int] = field(default_factory=dict)
    url: str = ""
    requests: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are recorded in Hub.requests instead."""

    def _serve(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(found[1], found[2])
        elif found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[2], found[3], body=body)
        else:
            self._error(404, "EntryNotFound")

    def _repo(self, repo_id: str, revision: str) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            self._error(401, "RepoNotFound")  # the Hub does not tell private from absent
        elif revision not in (*repo.branches, repo.commit):
            self._error(404, "RevisionNotFound")
        else:
            return repo
        return None

    def _info(self, repo_id: str, revision: str) -> None:
        if repo := self._repo(repo_id, revision):
            siblings = [{"rfilename": name} for name in repo.files]
            info = {"id": repo_id, "modelId": repo_id, "sha": repo.commit, "siblings": siblings, "tags": []}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(info).encode(), body=True)

    def _tree(self, repo_id: str, revision: str) -> None:
        if repo := self._repo(repo_id, revision):
            files = [{"type": "file", "path": name, **_entry(data)} for name, data in repo.files.items()]
            self._send(200, {"Content-Type": "application/json"}, json.dumps(files).encode(), body=True)

    def _file(self, repo_id: str, revision: str, name: str, *, body: bool) -> None:
        repo = self._repo(repo_id, revision)
        if repo is None:
            return
        if repo.token is not None and self.headers.get("Authorization") != f"Bearer {repo.token}":
            self._error(401, "GatedRepo")
            return
        if name not in repo.files:
            self._error(404, "EntryNotFound")
            return
        data = repo.files[name]
        headers = {
            "X-Repo-Commit": repo.commit,
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)),
            "Accept-Ranges": "bytes",
        }
        status, start = 200, 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, start = 206, int(found[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = max(0, self.hub.cut[name] - start) if name in self.hub.cut else None
        self._send(status, headers, data[start:], body=body, cut=cut)

    def _error(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": code}, b"", body=True)

    def _send(self, status: int, headers: dict[str, str], data: bytes, *, body: bool, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data if cut is None else data[:cut])
        if body and cut is not None and cut < len(data):
            self.close_connection = True


def _entry(data: bytes) -> dict[str, object]:
    """What the Hub lists of a file beside its name: here all go by LFS, whose digest is a SHA-256."""
    lfs = {"size": len(data), "oid": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
    return {"size": len(data), "oid": "0" * 40, "lfs": lfs}


@contextmanager
def serve(hub: Hub, handler: type[Handler] = Handler) -> Iterator[Hub]:
    """Serve `hub` at hub.url until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
