"""`tundish push`, in a process of its own, against a local server: what arrives, what goes twice, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from converters.errors import GateError, UsageError
from exporters.base import Target
from tests.hub_server import serve
from tests.hub_uploads import LARGE, TOKEN, UploadHandler, UploadHub
from tundish.manifest_file import read_manifest
from tundish.papers import write_papers
from tundish.push import Push
from tundish.push import push as push_build
from tundish.watcher import SILENT

REPO = "acme/tiny-int4"
GATE: dict[str, Any] = {"name": "runtime", "figure": None, "threshold": None, "detail": ""}
RESULT = {"passed": True, "versions": {}, "divergence": None, "answer": None, "gates": []}


@dataclass(frozen=True)
class Ended:
    status: int
    out: dict[str, Any]
    err: str


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """An empty one. Its commits have the ids of other tests': what was downloaded is kept apart."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    hub = UploadHub({})
    with serve(hub, UploadHandler):
        yield hub
        hub.release.set()


@pytest.fixture
def verified(poured: Path, tmp_path: Path) -> Path:
    """The build of the four containers, with a record that says that its gates have passed."""
    return with_verdict(poured, tmp_path / "built", dict.fromkeys(("gguf", "onnx", "openvino", "mlx"), True))


def with_verdict(poured: Path, folder: Path, verdicts: dict[str, bool | None]) -> Path:
    shutil.copytree(poured, folder)
    manifest = read_manifest(folder)
    manifest["verification"] = {
        target: RESULT | {"passed": passed, "gates": [GATE | {"passed": passed}]} for target, passed in verdicts.items()
    }
    write_papers(folder, manifest, None)
    return folder


def start(hub: UploadHub, *arguments: object, token: str = TOKEN) -> subprocess.Popen[str]:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "tundish", "push", *map(str, arguments), "--json"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def push(hub: UploadHub, *arguments: object, token: str = TOKEN) -> Ended:
    process = start(hub, *arguments, token=token)
    out, err = process.communicate(timeout=120)
    assert not out or out.startswith("{"), out
    assert TOKEN not in out + err and token not in err and "Traceback" not in err, err
    return Ended(process.returncode, json.loads(out) if out else {}, err)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_arrives_is_the_folder(hub: UploadHub, verified: Path) -> None:
    ended = push(hub, verified, f"hf://{REPO}/some/folder")
    assert ended.status == 0, ended.err
    sent = contents(verified)
    assert hub.repos[REPO].files == {".gitattributes": b"lfs"} | {f"some/folder/{name}": sent[name] for name in sent}
    assert hub.commits == ["int4, by tundish 0.1.0"] and hub.private == {REPO: True}
    assert (
        ended.out["commit"] == hub.repos[REPO].commit and ended.out["url"] == f"{hub.url}/{REPO}/tree/main/some/folder"
    )
    again = push(hub, verified, f"hf://{REPO}/some/folder", "--public")
    assert again.status == 0 and len(hub.commits) == 1, "nothing is new"
    assert len(hub.received) == len(set(hub.received)) and hub.private == {REPO: True}


def test_one_container(hub: UploadHub, verified: Path, poured: Path, tmp_path: Path) -> None:
    """At the top of its repository, with the provenance; the next push removes what it has not, and nothing else."""
    some = with_verdict(poured, tmp_path / "some", {"gguf": True, "onnx": False, "openvino": None, "mlx": None})
    assert push(hub, some, f"hf://{REPO}", "--target", "gguf", "--public").status == 0
    names = {"model.gguf", "Modelfile", "README.md", "provenance.json"}
    assert hub.repos[REPO].files.keys() == names | {".gitattributes"} and hub.private == {REPO: False}
    assert hub.repos[REPO].files["model.gguf"] == (some / "gguf" / "model.gguf").read_bytes()
    hub.repos[REPO].files["photo.png"] = b"their own"
    fewer = some / "gguf" / "Modelfile"
    fewer.unlink()
    manifest = read_manifest(some)
    del manifest["targets"]["gguf"]["files"]["Modelfile"]
    write_papers(some, manifest, None)
    ended = push(hub, some, f"hf://{REPO}", "--target", "gguf")
    assert ended.status == 0 and ended.out["removed"] == ["Modelfile"], ended.err
    assert hub.repos[REPO].files.keys() == (names - {"Modelfile"}) | {".gitattributes", "photo.png"}


def test_what_another_target_left_is_removed(hub: UploadHub, verified: Path, poured: Path, tmp_path: Path) -> None:
    """One container after another, and one after a whole build; files of the same names that are others' stay."""
    assert push(hub, verified, f"hf://{REPO}", "--target", "gguf").status == 0
    theirs = {".gitattributes": b"lfs", "genai_config.json": b"their own", "model.safetensors": b"too" * LARGE}
    hub.repos[REPO].files |= theirs
    openvino = push(hub, verified, f"hf://{REPO}", "--target", "openvino")
    assert openvino.status == 0 and openvino.out["removed"] == ["Modelfile", "model.gguf"]
    assert hub.repos[REPO].files.keys() == {*openvino.out["files"], *theirs}
    whole = push(hub, verified, f"hf://{REPO}")
    assert {"openvino_model.bin", "openvino_model.xml"} <= {*whole.out["removed"]}
    assert hub.repos[REPO].files == contents(verified) | theirs
    other = with_verdict(poured, tmp_path / "other", {"gguf": True, "onnx": None, "openvino": None, "mlx": None})
    gguf = push(hub, other, f"hf://{REPO}", "--target", "gguf")
    assert gguf.status == 0 and {"manifest.json", "gguf/model.gguf", "onnx/model.onnx"} < {*gguf.out["removed"]}
    assert hub.repos[REPO].files.keys() == {*gguf.out["files"], *theirs}


def test_somebody_else_pushes_meanwhile(hub: UploadHub, verified: Path) -> None:
    assert push(hub, verified, f"hf://{REPO}", "--target", "gguf").status == 0
    hub.stall_after = len(hub.received)
    process = start(hub, verified, f"hf://{REPO}", "--target", "mlx")
    assert hub.stalled.wait(60), process.stderr and process.stderr.read()
    hub.stall_after, hub.repos[REPO].commit = None, "f" * 40
    hub.release.set()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 5 and "Push again" in err and "model.gguf" in hub.repos[REPO].files


def test_a_killed_push_goes_on(hub: UploadHub, verified: Path) -> None:
    hub.stall_after = 2
    process = start(hub, verified, f"hf://{REPO}")
    assert hub.stalled.wait(60), process.stderr and process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(hub.received) == 2 and not hub.commits and hub.repos[REPO].files.keys() == {".gitattributes"}
    hub.stall_after = None
    assert push(hub, verified, f"hf://{REPO}").status == 0
    large = [name for name, data in contents(verified).items() if len(data) >= LARGE]
    assert len(large) >= 4 and len(hub.received) == len({*hub.received}) == len(large)
    assert {**contents(verified), ".gitattributes": b"lfs"} == hub.repos[REPO].files and len(hub.commits) == 1


def test_what_has_not_passed_stays_here(poured: Path, tmp_path: Path) -> None:
    def refused(folder: Path, target: Target | None = None) -> str:
        with pytest.raises(GateError) as error:
            push_build(Push(folder, f"hf://{REPO}", target), SILENT)
        return str(error.value)

    assert "gguf was not verified" in refused(poured)
    some = with_verdict(poured, tmp_path / "some", {"gguf": True, "onnx": False, "openvino": None})
    assert "onnx missed its gates, openvino was not verified, mlx was not verified" in refused(some)
    manifest = read_manifest(some)
    manifest["verification"]["onnx"]["passed"] = True
    write_papers(some, manifest, None)
    assert "the manifest is inconsistent" in refused(some, Target.ONNX), "whatever the verdict says, a gate failed"
    path = some / "gguf" / "Modelfile"
    path.write_bytes(path.read_bytes() + b"\n")
    assert "gguf/Modelfile" in refused(some, Target.GGUF)


@pytest.mark.parametrize("place", ["acme/tiny", "hf://acme", "hf://acme/tiny/../x", "hf://acme/tiny/.git", "s3://a/b"])
def test_no_place_on_the_hub(poured: Path, place: str) -> None:
    with pytest.raises(UsageError, match="no place on the Hub"):
        push_build(Push(poured, place), SILENT)


def test_refusals_are_told(hub: UploadHub, verified: Path) -> None:
    wrong = push(hub, verified, f"hf://{REPO}", "--target", "gguf", token="hf_wrong_one")
    assert wrong.status == 2 and "does not let this account write" in wrong.err and "hf auth login" in wrong.err
    hub.deny = 500
    ended = push(hub, verified, f"hf://{REPO}", "--target", "gguf")
    assert ended.status == 5 and "the Hub refused the push" in ended.err
    hub.deny, hub.lose = None, ("Modelfile",)
    ended = push(hub, verified, f"hf://{REPO}", "--target", "gguf")
    assert ended.status == 5 and "not everything arrived" in ended.err and "Modelfile" in ended.err
    nobody = UploadHub({}, url="http://127.0.0.1:9")
    ended = push(nobody, verified, f"hf://{REPO}", "--target", "gguf")
    assert ended.status == 6 and "the push broke off" in ended.err
