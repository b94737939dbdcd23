"""Folders, the Hub's protocol, its cache and its failures. Each download runs in a process of its own, as users' do."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from converters.errors import ModelError, UsageError
from converters.source import blaming_changes, require_unchanged, resolve_source, source_digest, source_stamp
from tests.hub_server import Hub, Repo, serve

REPO_ID = "acme/tiny-model"
COMMIT = Repo({}).commit
WEIGHTS = save({"model.norm.weight": np.ones(50_000, np.float32)})
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b'{"do_sample": true}',  # no two wanted files are equal: the cache keeps such once
    "tokenizer.json": b"{}",
    "tokenizer.model": b"spm",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"# Tiny",
    "model.safetensors": WEIGHTS,
    "consolidated.safetensors": b"a second copy",
    "pytorch_model.bin": b"a pickle",
    "modeling_tiny.py": b"code",
    "onnx/config.json": b"{}",
}
WANTED = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
}

SCRIPT = """
import json, sys
from converters.errors import TundishError
from converters.source import resolve_source
try:
    source = resolve_source(sys.argv[1], sys.argv[2] or None)
except TundishError as error:
    print(json.dumps({"error": str(error), "status": error.exit_status}))
else:
    print(json.dumps([source.name, str(source.folder), source.repo_id, source.revision]))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub({REPO_ID: Repo(dict(FILES)), "acme/gated": Repo(dict(FILES), token="secret")})) as running:
        yield running


def resolve(model: str, home: Path, endpoint: str, revision: str = "", **environment: str) -> list[str]:
    """What resolve_source gives in a fresh process with its own cache; AssertionError with the message if it fails."""
    result = run(model, home, endpoint, revision, **environment)
    assert isinstance(result, list), result
    return result


def refuse(model: str, home: Path, endpoint: str, revision: str = "", **environment: str) -> str:
    """The message with which resolve_source refuses."""
    result = run(model, home, endpoint, revision, **environment)
    assert isinstance(result, dict), result
    assert result["status"] == 3
    return str(result["error"])


def run(model: str, home: Path, endpoint: str, revision: str, **environment: str) -> object:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, revision],
        env=kept | settings,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_download_then_offline(hub: Hub, tmp_path: Path) -> None:
    name, folder, repo_id, revision = resolve(REPO_ID, tmp_path, hub.url)
    assert (name, repo_id, revision) == ("tiny-model", None, None)
    assert {path.name for path in Path(folder).iterdir()} == WANTED
    assert all((Path(folder) / name).read_bytes() == FILES[name] for name in WANTED)
    digests = source_digest(Path(folder))
    assert digests["model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert set(digests) == WANTED - {"README.md"}

    seen = len(hub.requests)
    offline = resolve(REPO_ID, tmp_path, hub.url, HF_HUB_OFFLINE="1")
    assert offline == [name, folder, repo_id, revision]
    assert len(hub.requests) == seen

    unreachable = resolve(REPO_ID, tmp_path, "http://127.0.0.1:9")
    assert unreachable == offline

    again = resolve(REPO_ID, tmp_path, hub.url)
    assert again == offline
    assert not [request for request in hub.requests[seen:] if request.startswith("GET") and "/resolve/" in request]


def test_revision_is_pinned_to_a_commit(hub: Hub, tmp_path: Path) -> None:
    assert resolve(REPO_ID, tmp_path, hub.url, "main")[3] == COMMIT
    assert resolve(REPO_ID, tmp_path, hub.url, COMMIT)[3] == COMMIT
    message = refuse(REPO_ID, tmp_path, hub.url, "v9")
    assert "no such revision" in message
    assert "'v9'" in message


def test_repository_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    message = refuse("acme/nothing", tmp_path, hub.url)
    assert "no such folder, and no such model on the Hub (acme/nothing)" in message
    assert "HF_TOKEN" in message


def test_gated_repository(hub: Hub, tmp_path: Path) -> None:
    message = refuse("acme/gated", tmp_path, hub.url)
    assert "gated" in message
    assert f"{hub.url}/acme/gated" in message
    assert resolve("acme/gated", tmp_path, hub.url, HF_TOKEN="secret")[3] == COMMIT


def test_offline_and_not_cached(tmp_path: Path) -> None:
    assert "HF_HUB_OFFLINE is set" in refuse(REPO_ID, tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert "http://127.0.0.1:9 does not answer" in refuse(REPO_ID, tmp_path, "http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json"])
def test_cut_download_is_not_taken_as_complete(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.cut[name] = len(FILES[name]) // 2
    assert "download broke off" in refuse(REPO_ID, tmp_path, hub.url)
    assert "not in the Hub's cache" in refuse(REPO_ID, tmp_path, hub.url, HF_HUB_OFFLINE="1")
    hub.cut.clear()
    folder = Path(resolve(REPO_ID, tmp_path, hub.url)[1])
    assert (folder / name).read_bytes() == FILES[name]


def test_local_folder(tmp_path: Path) -> None:
    source = resolve_source(str(tmp_path))
    assert (source.name, source.folder, source.repo_id, source.revision) == (tmp_path.name, tmp_path, None, None)
    with pytest.raises(UsageError, match="a folder has no revisions"):
        resolve_source(str(tmp_path), "main")


def test_folder_wins_over_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / REPO_ID).mkdir(parents=True)
    source = resolve_source(REPO_ID)
    assert (source.folder, source.repo_id) == (tmp_path / REPO_ID, None)
    assert resolve_source(".").name == tmp_path.name


def test_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    result = run(REPO_ID, tmp_path / "file" / "home", hub.url, "")
    assert isinstance(result, dict)
    assert result["status"] == 5
    assert "cache cannot be written" in result["error"]


def test_a_path_like_those_of_the_hubs_cache_proves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "models--acme--tiny-model" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    source = resolve_source(str(folder))
    assert (source.name, source.repo_id, source.revision) == ("tiny-model", None, None)


@pytest.mark.parametrize("model", ["./absent/model", "absent", "/absent/model", "a/b/c", "../x/y", "owner/na me"])
def test_path_that_is_not_there_never_asks_the_hub(model: str) -> None:
    with pytest.raises(ModelError, match="no such folder") as caught:
        resolve_source(model)
    assert "Hub id" in str(caught.value)


@pytest.mark.parametrize("model", ["a" * 300, "x/" * 3000, "~nobody-of-this-name/x"])
def test_impossible_path(model: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        resolve_source(model)


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://127.0.0.1:9", "http:"])
def test_invalid_endpoint(tmp_path: Path, endpoint: str) -> None:
    result = run(REPO_ID, tmp_path, endpoint, "")
    assert isinstance(result, dict)
    assert result["status"] == 2
    assert "HF_ENDPOINT" in result["error"]
    assert repr(endpoint) in result["error"]


def test_digest_of_a_folder_with_odd_things_in_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "gone.json").symlink_to("nowhere")
    (tmp_path / "tokenizer.model").mkdir()
    assert set(source_digest(tmp_path)) == {"model.safetensors", "config.json"}


def test_file_instead_of_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="model is a file"):
        resolve_source(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("change", ["overwritten, its time set back", "removed", "written beside"])
def test_a_change_is_seen(tmp_path: Path, change: str) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(WEIGHTS)
    (tmp_path / "config.json").write_bytes(b"{}")
    stamp, times = source_stamp(tmp_path), weights.stat()
    require_unchanged(tmp_path, stamp)
    weights.read_bytes()
    require_unchanged(tmp_path, stamp)
    time.sleep(0.02)  # file systems tell times by the tick
    if change == "removed":
        weights.unlink()
    elif change == "written beside":
        (tmp_path / "generation_config.json").write_bytes(b"{}")
    else:
        with weights.open("r+b") as file:
            file.write(WEIGHTS)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ModelError, match="the checkpoint changed while it was read"):
        require_unchanged(tmp_path, stamp)


def test_an_error_over_a_checkpoint_that_changed_says_that(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(WEIGHTS)
    stamp = source_stamp(tmp_path)
    for error in (ModelError("shorter than its header says"), OSError("gone"), ValueError("our mistake")):
        with pytest.raises(type(error), match=str(error)), blaming_changes(tmp_path, stamp):
            raise error
    weights.unlink()
    for error in (ModelError("shorter than its header says"), OSError("gone")):
        with pytest.raises(ModelError, match="the checkpoint changed"), blaming_changes(tmp_path, stamp):
            raise error
