"""A finished folder goes under its final name, and what stood there is never harmed."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from converters.errors import ResourceError, UsageError
from exporters.base import Target
from tests.tundish.old_build import old_build
from tundish import publish as publishing
from tundish.exchange import exchange
from tundish.publish import publish, reject, require_replaceable, staging
from tundish.signals import deferred_signals

ROOT = Path(__file__).resolve().parents[2]


def test_replaces_an_earlier_build(tmp_path: Path, way: str) -> None:
    out = tmp_path / "a name with späces"
    old_build(out)
    require_replaceable(out, [Target.GGUF])
    with staging(out) as folder:
        (folder / "new").write_text("new")
        publish(folder, out, [Target.GGUF])
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old_build(out)
    with pytest.raises(KeyboardInterrupt), staging(out) as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "gguf" / "model.gguf").read_text() == "old"


def test_a_failed_rename_puts_the_old_back(tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    old_build(out)
    with pytest.raises(Exception, match="cannot write"):
        publish(tmp_path / "absent", out, [Target.GGUF])
    assert (out / "gguf" / "model.gguf").read_text() == "old"


@pytest.mark.parametrize("kind", ["foreign folder", "file", "extra file", "foreign manifest", "link", "link inside"])
def test_refuses_what_it_did_not_write(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        out.symlink_to(tmp_path)
    else:
        old_build(out)
        if kind == "foreign folder":
            (out / "manifest.json").unlink()
        elif kind == "extra file":
            (out / "gguf" / "notes.txt").write_text("mine")
        elif kind == "link inside":
            (out / "mine").symlink_to(tmp_path, target_is_directory=True)
        else:
            (out / "manifest.json").write_text("[]")
    with pytest.raises(UsageError, match=r"--out|not a manifest"):
        require_replaceable(out, [Target.GGUF])


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    require_replaceable(out, [Target.GGUF])
    with staging(out) as folder:
        (folder / "new").write_text("new")
        publish(folder, out, [Target.GGUF])
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "new").read_text() == "new"


def test_other_containers_are_not_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old_build(out)
    with pytest.raises(UsageError, match="would remove: gguf"):
        require_replaceable(out, [Target.MLX])


# ---- what happens while a build runs ----


def appear(out: Path, kind: str) -> None:
    if kind == "file":
        out.write_text("precious")
    elif kind == "link":
        out.symlink_to(out.parent / "elsewhere")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("precious")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
@pytest.mark.parametrize("name", ["out.new", "out.new2"])
def test_what_appeared_during_the_build_stays(tmp_path: Path, kind: str, name: str) -> None:
    out = tmp_path / "out"
    if name == "out.new2":
        (tmp_path / "out.new").symlink_to("nowhere")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=rf"changed during the build.*{name}\.$"), staging(out) as folder:
        (folder / "new").write_text("new")
        appear(out, kind)
        moved = out.lstat().st_ctime_ns
        publish(folder, out, [Target.GGUF])
    assert (tmp_path / name / "new").read_text() == "new", "the build is not lost"
    assert out.lstat().st_ctime_ns == moved, "not even for a moment"
    assert {path.name for path in tmp_path.iterdir()} == before | {"out", name}
    if kind == "link":
        assert out.readlink() == tmp_path / "elsewhere"
    else:
        assert (out / "thesis.tex" if kind == "folder" else out).read_text() == "precious"


def test_what_appeared_between_the_check_and_the_rename_stays(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    old_build(out)

    def late(one: Path, other: Path) -> bool:
        (out / "thesis.tex").write_text("precious")
        return way == "exchange" and exchange(one, other)

    monkeypatch.setattr(publishing, "exchange", late)
    with pytest.raises(UsageError, match=r"changed.*thesis\.tex"), staging(out) as folder:
        publish(folder, out, [Target.GGUF])
    assert (out / "thesis.tex").read_text() == "precious" and (out / "gguf" / "model.gguf").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.new"}


def test_a_name_taken_between_the_check_and_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        if target == out:
            appear(out, "folder")
        return rename(path, target)

    with pytest.raises(UsageError, match=r"took the name.*out\.new"), staging(out) as folder:
        monkeypatch.setattr(Path, "rename", late)
        publish(folder, out, [Target.GGUF])
    assert (out / "thesis.tex").read_text() == "precious" and (tmp_path / "out.new").is_dir()


def test_another_build_of_other_containers_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"changed during the build.*would remove: gguf"), staging(out) as folder:
        old_build(out)
        publish(folder, out, [Target.MLX])
    assert (out / "gguf" / "model.gguf").read_text() == "old" and (tmp_path / "out.new").is_dir()


def test_a_rejected_build_takes_a_free_name(tmp_path: Path) -> None:
    rejected = tmp_path / "out.rejected"
    with staging(tmp_path / "out") as folder:
        assert reject(folder, rejected) == rejected
    rejected.rmdir()
    with staging(tmp_path / "out") as folder:
        appear(rejected, "folder")
        assert reject(folder, rejected) == tmp_path / "out.rejected2"
    assert (rejected / "thesis.tex").read_text() == "precious"


# ---- signals ----


class AlternateStack(ctypes.Structure):
    """Linux's stack_t."""

    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("nbytes", ctypes.c_size_t)]


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Ctrl-C, which whoever started pytest may have switched off.

    OpenVINO, when it compiles a model, leaves the main thread an alternate signal stack that is no memory any more, on
    which the next signal ends the process. Other tests do that in this one; a build only does it in its children.
    """
    if sys.platform == "linux":
        disabled = 2  # SS_DISABLE
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(AlternateStack(None, disabled, 0)), None) == 0
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_signal_at_a_rename_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[], None], moment: int
) -> None:
    out = tmp_path / "out"
    old_build(out)
    rename, renamed = Path.rename, []

    def interrupted(path: Path, target: Path) -> Path:
        new = rename(path, target)
        renamed.append(path)
        if len(renamed) == moment:
            interrupt()
        return new

    monkeypatch.setattr(publishing, "exchange", lambda one, other: False)
    with pytest.raises(KeyboardInterrupt), staging(out) as folder:
        (folder / "new").write_text("new")
        monkeypatch.setattr(Path, "rename", interrupted)
        publish(folder, out, [Target.GGUF])
    assert len(renamed) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and [path.name for path in out.iterdir()] == ["new"]


@pytest.mark.parametrize("published", [True, False])
def test_a_signal_while_a_folder_is_removed_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[], None], published: bool
) -> None:
    out = tmp_path / "out"
    old_build(out)
    unlink = os.unlink

    def interrupted(*arguments: Any, **options: Any) -> None:
        interrupt()
        unlink(*arguments, **options)

    with pytest.raises(KeyboardInterrupt), staging(out) as folder:
        (folder / "new").write_text("new")
        monkeypatch.setattr(os, "unlink", interrupted)
        if published:
            publish(folder, out, [Target.GGUF])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "new").exists() == published


@pytest.mark.parametrize("step", ["mkdtemp", "chmod", "rename"])
def test_a_signal_while_the_folder_is_made_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[], None], step: str
) -> None:
    owner = tempfile if step == "mkdtemp" else Path
    make = getattr(owner, step)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        made = make(*arguments, **options)
        interrupt()
        return made

    monkeypatch.setattr(owner, step, interrupted)
    with pytest.raises(KeyboardInterrupt), staging(tmp_path / "out"):
        raise AssertionError("the signal came before")
    assert not list(tmp_path.iterdir())


def test_signals_wait_for_the_outermost_block(interrupt: Callable[[], None]) -> None:
    passed = []
    with pytest.raises(KeyboardInterrupt):
        with deferred_signals():
            with deferred_signals():
                interrupt()
                passed.append("inner")
            passed.append("outer")
        passed.append("beyond")
    assert passed == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_threads_publish_too(tmp_path: Path) -> None:
    def build() -> None:
        with staging(tmp_path / "out") as folder:
            publish(folder, tmp_path / "out", [Target.GGUF])

    with ThreadPoolExecutor(1) as pool:
        pool.submit(build).result()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- places that cannot be used ----


def test_a_folder_that_cannot_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it would be removed unseen."""
    out = tmp_path / "out"
    old_build(out)
    (out / "gguf" / "closed").mkdir()
    scandir = os.scandir

    def refusing(path: Any) -> Any:  # as a system does, but for its administrator
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UsageError, match=r"cannot look into the folder \(.*closed\); found Permission denied"):
        require_replaceable(out, [Target.GGUF])


@pytest.mark.parametrize("folder", ["", "x" * 300])
def test_a_name_that_is_too_long(tmp_path: Path, folder: str) -> None:
    told = r"cannot write: File name too long.*Choose a shorter --out"
    with pytest.raises(ResourceError, match=told), staging(tmp_path / folder / ("x" * 229)):
        pass
    assert not list(tmp_path.iterdir())
    with staging(tmp_path / ("x" * 228)):
        pass
