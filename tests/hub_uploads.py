"""The other half of the Hub's protocol: new repositories, large files by Git LFS, commits. With faults on demand.

https://huggingface.co/docs/hub/api and https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_server import Handler, Hub, Repo

TOKEN = "hf_a_very_secret_token"
LARGE = 100_000  # bytes from which on a file goes by LFS


@dataclass
class UploadHub(Hub):
    """`stall_after`: so many large files arrive, and no request with another one is ever answered. `lose`: names that
    a commit leaves out, as a .gitignore does. `deny`: the status of every request that writes."""

    stall_after: int | None = None
    lose: tuple[str, ...] = ()
    deny: int | None = None
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256
    received: list[str] = field(default_factory=list)  # SHA-256 of each upload, in order
    commits: list[str] = field(default_factory=list)
    private: dict[str, bool] = field(default_factory=dict)
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


class UploadHandler(Handler):
    hub: UploadHub  # type: ignore[misc]

    def do_POST(self) -> None:  # noqa: N802  # http.server's name
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
            return
        if self.hub.deny is not None or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(self.hub.deny or 401, "")
            return
        routes: list[tuple[str, Callable[[bytes, str], None]]] = [
            (r"/api/repos/(create)", self._create),
            (r"/api/models/([^/]+/[^/]+)/preupload/main", self._preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/api/models/([^/]+/[^/]+)/commit/main", self._commit),
            (r"/api/models/([^/]+/[^/]+)/paths-info/.+", self._paths),
        ]
        found, route = next((found, route) for rule, route in routes if (found := re.fullmatch(rule, path)))
        route(body, found[1])

    def do_PUT(self) -> None:  # noqa: N802
        oid = self.path.removeprefix("/upload/")
        data = self.rfile.read(int(self.headers["Content-Length"]))
        with self.hub.lock:
            stall = self.hub.stall_after is not None and len(self.hub.received) >= self.hub.stall_after
            if not stall:
                assert hashlib.sha256(data).hexdigest() == oid
                self.hub.objects[oid] = data
                self.hub.received.append(oid)
        if stall:
            self.hub.stalled.set()
            self.hub.release.wait()
            self.close_connection = True
            return
        self._send(200, {}, b"", body=True)

    def _create(self, body: bytes, _: str) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        status = 409 if repo_id in self.hub.repos else 200
        if status == 200:
            self.hub.repos[repo_id] = Repo({".gitattributes": b"lfs"}, commit="0" * 40)
            self.hub.private[repo_id] = asked["visibility"] == "private"
        self._json({"url": f"{self.hub.url}/{repo_id}"}, status)

    def _preupload(self, body: bytes, repo_id: str) -> None:
        files = self.hub.repos[repo_id].files
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                        "shouldIgnore": False,
                        "oid": _oid(files[file["path"]]) if file["path"] in files else None,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def _batch(self, body: bytes, _: str) -> None:
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{entry['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, body: bytes, repo_id: str) -> None:
        repo = self.hub.repos[repo_id]
        header, *operations = map(json.loads, body.splitlines())
        if header["value"].get("parentCommit", repo.commit) != repo.commit:
            self._error(412, "")
            return
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del repo.files[value["path"]]
            elif value["path"] not in self.hub.lose:
                large = operation["key"] == "lfsFile"
                data = self.hub.objects[value["oid"]] if large else base64.b64decode(value["content"])
                repo.files[value["path"]] = data
        self.hub.commits.append(header["value"]["summary"])
        repo.commit = f"{len(self.hub.commits):040x}"
        self._json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{repo.commit}", "commitOid": repo.commit})

    def _paths(self, body: bytes, repo_id: str) -> None:
        files = self.hub.repos[repo_id].files
        names = [name for name in parse_qs(body.decode())["paths"] if name in files]
        self._json([_path_info(name, files[name]) for name in names])

    def _json(self, document: object, status: int = 200) -> None:
        self._send(status, {"Content-Type": "application/json"}, json.dumps(document).encode(), body=True)


def _path_info(name: str, data: bytes) -> dict[str, Any]:
    info: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _git_oid(data)}
    if len(data) >= LARGE:
        info["oid"] = "0" * 40  # of the pointer
        info["lfs"] = {"size": len(data), "oid": _oid(data), "pointerSize": 130}
    return info


def _oid(data: bytes) -> str:
    """What the Hub compares with what a client has: SHA-256 of a large file, git's object id of any other."""
    return hashlib.sha256(data).hexdigest() if len(data) >= LARGE else _git_oid(data)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()
