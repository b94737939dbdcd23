"""Papers of a build are written while others may be at it, the disk may be full, and the process may be killed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from converters.errors import GateError, ResourceError
from exporters.base import Target
from tests.tundish.keys import write_keys
from tests.tundish.test_holding import holder
from tundish import holding, integrity, recheck
from tundish import push as push_module
from tundish.cli import verify as verify_command
from tundish.disk import replace_file
from tundish.gates import record_results
from tundish.integrity import Signature, require_intact
from tundish.manifest_file import MANIFEST, PROVENANCE, SIGNATURE, read_manifest
from tundish.papers import sign_build, sign_folder, write_papers
from tundish.publish import require_replaceable, restore
from tundish.push import Push, push
from tundish.recheck import verify_again
from tundish.results import Gate, TargetResult
from tundish.signing import load_signer, sign
from tundish.watcher import SILENT, Watcher

PASSED = {target: TargetResult(target, (Gate("runtime", True),)) for target in Target}


@pytest.fixture
def built(poured: Path, tmp_path: Path) -> Path:
    return shutil.copytree(poured, tmp_path / "built")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_a_disk_without_room_for_the_papers_leaves_the_build_as_it_was(built: Path) -> None:
    from resource import RLIMIT_FSIZE, getrlimit, setrlimit

    before, limits = contents(built), getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, ((built / MANIFEST).stat().st_size - 1, limits[1]))  # cards and report do fit
    try:
        with pytest.raises(ResourceError, match=r"cannot write"):
            record_results(read_manifest(built), list(PASSED.values()), built, built)
    finally:
        setrlimit(RLIMIT_FSIZE, limits)
    assert contents(built) == before
    require_intact(built, 1)
    require_replaceable(built, Target)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_what_a_killed_verify_left_is_removed_by_whoever_holds_the_build(built: Path, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        calls: list[int] = []

        def killing(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) == 6:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = killing  # type: ignore[assignment]
        try:
            write_papers(built, read_manifest(built), None)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = {path.relative_to(built).parent.as_posix() for path in built.rglob(".*.new")}
    assert left == {".", *read_manifest(built)["targets"]}, "of the cards, the report and the manifest"
    restored = shutil.copytree(built, tmp_path / "restored")
    sign_build(built, write_keys(tmp_path, "key"), 1)
    assert require_intact(built, 1).signature is Signature.UNCHECKED
    restore(restored, print)  # as a build does
    require_replaceable(restored, Target)


@pytest.mark.parametrize("planted", ["report.md", "gguf/README.md", PROVENANCE, SIGNATURE, MANIFEST])
@pytest.mark.parametrize("keyed", [False, True])
def test_nothing_is_written_into_a_signed_build(built: Path, tmp_path: Path, planted: str, keyed: bool) -> None:
    """Whoever can put files beside it could otherwise have `verify` put papers in place of those that are signed."""
    sign_build(built, write_keys(tmp_path, "key"), 1)
    path = built / planted
    temporary = path.with_name(f".{path.name}.0123abcd.new")
    temporary.write_text("planted")
    (built / ".0123abcd.ready").touch()
    before = contents(built)
    with pytest.raises(GateError, match=f"files differ.*{temporary.name}"):
        verify_command(built, key=tmp_path / "key.pub" if keyed else None, files_only=True)
    restore(built, print)  # as a build does
    assert contents(built) == before


def test_signing_again_removes_what_a_killed_one_had_left(built: Path, tmp_path: Path) -> None:
    key = write_keys(tmp_path, "key")
    sign_build(built, key, 1)
    before = contents(built)
    (built / f".{SIGNATURE}.0123abcd.new").write_text("half")
    sign_build(built, key, 1)
    assert contents(built) == before


def test_a_signature_that_came_during_verification_stays(
    built: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer, said = load_signer(write_keys(tmp_path, "key")), list[str]()
    assert signer is not None

    def measure(*arguments: object, **names: object) -> list[TargetResult]:
        replace_file(built / SIGNATURE, sign((built / PROVENANCE).read_bytes(), signer))
        before.update(contents(built))
        return list(PASSED.values())

    before: dict[Path, bytes] = {}
    monkeypatch.setattr(recheck, "verify", measure)
    manifest = verify_again(built, str(checkpoint), 1, Watcher(said.append, SILENT.start, SILENT.advance))
    assert manifest["verification"]["gguf"]["passed"] and contents(built) == before
    assert "the folder is signed: its manifest and report stay as they are" in said
    require_intact(built, 1, tmp_path / "key.pub")


def changing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, path: Path, old: bytes, new: bytes) -> None:
    """Have a file changed by somebody else right after that function has returned."""
    function = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        result = function(*arguments)
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new))
        return result

    monkeypatch.setattr(owner, name, call)


def test_what_was_checked_is_what_is_signed(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = (built / PROVENANCE).read_bytes()
    changing(monkeypatch, integrity, "_require_consistent", built / PROVENANCE, b"0.1.0", b"9.9.9")
    sign_build(built, write_keys(tmp_path, "key"), 1)
    assert base64.b64decode(json.loads((built / SIGNATURE).read_bytes())["payload"]) == checked
    with pytest.raises(GateError, match=f"files differ.*found {PROVENANCE}"):
        require_intact(built, 1, tmp_path / "key.pub")


def test_only_the_build_that_is_meant_is_signed(built: Path, tmp_path: Path) -> None:
    """As a matrix has it: another may have taken the place. And what nobody measured is told."""
    signer, manifest, said = load_signer(write_keys(tmp_path, "key")), read_manifest(built), list[str]()
    assert signer is not None
    with pytest.raises(GateError, match="another build took the place"):
        sign_folder(built, signer, 1, said.append, {**manifest, "recipe_digest": "00"})
    assert not (built / SIGNATURE).exists() and not said
    sign_folder(built, signer, 1, said.append, manifest)
    assert said == ["warning: what is signed was not verified: gguf, onnx, openvino, mlx"]
    assert require_intact(built, 1, tmp_path / "key.pub").signature is Signature.VALID


def test_a_manifest_that_changes_after_its_digest_was_taken(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what the statement does not repeat."""
    record_results(read_manifest(built), list(PASSED.values()), built, built)
    changing(monkeypatch, integrity, "sha256_of", built / MANIFEST, b'"answer": null', b'"answer": "yes"')
    with pytest.raises(GateError, match=f"files differ.*found {MANIFEST}"):
        require_intact(built, 1)


@pytest.mark.parametrize(("name", "target"), [("report.md", None), (PROVENANCE, Target.GGUF)])
def test_what_was_checked_is_what_is_pushed(
    built: Path, monkeypatch: pytest.MonkeyPatch, name: str, target: Target | None
) -> None:
    record_results(read_manifest(built), list(PASSED.values()), built, built)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **names: None)  # nothing goes out
    changing(monkeypatch, push_module, "_require_passed", built / name, b"int4", b"int8")
    with pytest.raises(GateError, match=rf"a file changed while it was pushed \({name}\)"):
        push(Push(built, "hf://acme/tiny", target), SILENT)


class WaitedError(Exception):
    """Who waits says so and looks again later."""


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
@pytest.mark.parametrize("command", ["sign", "push", "verify", "verify --files-only"])
def test_commands_wait_for_the_build(
    built: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sleep(seconds: float) -> None:
        raise WaitedError

    key, watcher = write_keys(tmp_path, "key"), Watcher(print, SILENT.start, SILENT.advance)
    commands: dict[str, Callable[[], object]] = {
        "sign": lambda: sign_build(built, key, 1, watcher),
        "push": lambda: push(Push(built, "hf://acme/tiny"), watcher),
        "verify": lambda: verify_again(built, None, 1, watcher),
        "verify --files-only": lambda: verify_command(built, files_only=True),
    }
    monkeypatch.setattr(holding, "time", SimpleNamespace(sleep=sleep))
    with holder(built) as process, pytest.raises(WaitedError):
        commands[command]()
    said = "".join(capsys.readouterr())
    assert f"waiting for {built}, which process {process.pid}" in said and not (built / SIGNATURE).exists()
