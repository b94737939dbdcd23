"""Servers that are hostile, silent or endless, and caches that do not have the bytes that their names say."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub.utils._shared_blobs import publish_blob_to_shared_store

from converters.errors import ModelError
from converters.hub_digests import announced_digests
from converters.mask import masked
from converters.source import Source, resolve_source, source_digest
from tests.converters.test_source import COMMIT, FILES, REPO_ID, refuse, resolve
from tests.hub_server import Handler, Hub, Repo, serve


def hub() -> Hub:
    return Hub({REPO_ID: Repo(dict(FILES))})


class Hostile(Handler):
    """Announces a name that leads out of the cache."""

    name: ClassVar[str] = "ETag"

    def send_header(self, keyword: str, value: str) -> None:
        super().send_header(keyword, "../../../../escaped" if keyword == self.name else value)


class HostileCommit(Hostile):
    name = "X-Repo-Commit"


@pytest.mark.parametrize("handler", [Hostile, HostileCommit])
def test_names_that_lead_out_of_the_cache(tmp_path: Path, handler: type[Handler]) -> None:
    home = tmp_path / "a" / "b" / "home"
    with serve(hub(), handler) as running:
        assert "answer names no digest" in refuse(REPO_ID, home, running.url)
    assert not list(tmp_path.rglob("*escaped*"))


def test_a_commit_that_is_none(tmp_path: Path) -> None:
    with serve(Hub({REPO_ID: Repo(dict(FILES), commit="../../escaped")})) as running:
        assert "answer names no digest" in refuse(REPO_ID, tmp_path / "a" / "home", running.url)
    assert not list(tmp_path.rglob("*escaped*"))


class WebServer(Handler):
    """Has an ETag of its own for what names no file: base64, as Express writes it."""

    def send_header(self, keyword: str, value: str) -> None:
        super().send_header(keyword, value)
        if keyword == "Content-Length" and not (self.command == "HEAD" and "/resolve/" in self.path):
            super().send_header("ETag", 'W/"1f-Ab/c+d="')


def test_an_etag_that_names_no_file(tmp_path: Path) -> None:
    with serve(hub(), WebServer) as running:
        assert resolve(REPO_ID, tmp_path, running.url)[3] == COMMIT


class Circle(Handler):
    def _serve(self, *, body: bool) -> None:
        self._send(302, {"Location": self.path}, b"", body=body)


class Silent(Handler):
    def _serve(self, *, body: bool) -> None:
        time.sleep(4)
        self.close_connection = True


class Drops(Handler):
    """Sends a byte from time to time, for as long as somebody listens."""

    def _serve(self, *, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        for _ in range(60):
            try:
                self.wfile.write(b" ")
            except OSError:
                break
            time.sleep(0.1)
        self.close_connection = True


class Later(Handler):
    def _serve(self, *, body: bool) -> None:
        self._send(429, {"Retry-After": "86400"}, b"", body=body)


@pytest.mark.parametrize(
    ("handler", "found"),
    [
        (Circle, "redirects without end"),
        (Silent, "no answer in time"),
        (Drops, "bytes in 1 s"),
        (Later, "asked again in 86,400 s"),
    ],
)
def test_servers_that_never_come_to_an_end(tmp_path: Path, handler: type[Handler], found: str) -> None:
    with serve(hub(), handler) as running:
        start = time.monotonic()
        message = refuse(REPO_ID, tmp_path, running.url, status=6, HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1")
        assert time.monotonic() - start < 15
    assert "could not be reached" in message
    assert found in message


def test_a_silent_server_is_no_matter_to_a_whole_cache(tmp_path: Path) -> None:
    with serve(hub()) as running:
        once = resolve(REPO_ID, tmp_path, running.url)
    with serve(hub(), Circle) as running:
        assert resolve(REPO_ID, tmp_path, running.url) == once


def test_credentials_are_not_told(tmp_path: Path) -> None:
    message = refuse(REPO_ID, tmp_path, "http://me:secret@127.0.0.1:9", status=6)
    assert "secret" not in message
    assert "127.0.0.1:9" in message
    assert masked("see https://u:p@host/a@b and http://plain/") == "see https://…@host/a@b and http://plain/"


def snapshot(folder: Path, blobs: dict[str, tuple[str, bytes]]) -> Path:
    """A snapshot in the Hub's cache: file -> name of its blob and the bytes of that."""
    made = folder / "models--acme--tiny-model" / "snapshots" / COMMIT
    made.mkdir(parents=True)
    (made.parents[1] / "blobs").mkdir()
    for name, (blob, data) in blobs.items():
        (made.parents[1] / "blobs" / blob).write_bytes(data)
        (made / name).symlink_to(f"../../blobs/{blob}")
    return made


def test_a_bit_flipped_in_the_cache(tmp_path: Path) -> None:
    weights, config = FILES["model.safetensors"], FILES["config.json"]
    flipped = weights[:-1] + bytes([weights[-1] ^ 1])
    digest = hashlib.sha256(weights).hexdigest()
    git = hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()
    sound = snapshot(tmp_path / "a", {"config.json": (git, config), "model.safetensors": (digest, weights)})
    announced = announced_digests(sound)
    assert announced == {"model.safetensors": digest}
    Source("tiny-model", sound, announced=announced).require_announced(source_digest(sound))

    damaged = snapshot(tmp_path / "b", {"config.json": (git, config), "model.safetensors": (digest, flipped)})
    with pytest.raises(ModelError, match=r"model\.safetensors.*not what|not what.*model\.safetensors"):
        Source("tiny-model", damaged, announced=announced).require_announced(source_digest(damaged))
    with pytest.raises(ModelError, match=r"not what the Hub announced .*config\.json"):
        announced_digests(snapshot(tmp_path / "c", {"config.json": (git, config + b" ")}))


def test_a_blob_that_repositories_share(tmp_path: Path) -> None:
    """huggingface_hub puts a link in its place, to a file that has the hash of its Xet storage for a name."""
    weights = FILES["model.safetensors"]
    digest = hashlib.sha256(weights).hexdigest()
    folder = snapshot(tmp_path, {"model.safetensors": (digest, weights)})
    blob = folder.parents[1] / "blobs" / digest
    shared = publish_blob_to_shared_store(
        blob_path=str(blob), xet_hash="ab" * 32, cache_dir=str(tmp_path), expected_size=len(weights)
    )
    assert shared
    assert (folder / "model.safetensors").resolve().name == "ab" * 32
    assert announced_digests(folder) == {"model.safetensors": digest}


class OtherBytes(Handler):
    def send_header(self, keyword: str, value: str) -> None:
        other = f'"{hashlib.sha256(self.path.encode()).hexdigest()}"'
        super().send_header(keyword, other if keyword == "ETag" else value)


def test_a_server_that_sends_other_bytes_than_it_announces(tmp_path: Path) -> None:
    with serve(hub(), OtherBytes) as running:
        folder = Path(resolve(REPO_ID, tmp_path, running.url)[1])
    source = Source("tiny-model", folder, announced=announced_digests(folder))
    with pytest.raises(ModelError, match="not what the Hub announced"):
        source.require_announced(source_digest(folder))


def test_a_path_is_nobodys_name(tmp_path: Path) -> None:
    source = resolve_source(str(snapshot(tmp_path, {"config.json": ("0" * 40, b"{}")})))
    assert (source.repo_id, source.revision) == (None, None)
