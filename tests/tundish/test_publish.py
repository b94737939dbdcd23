"""A finished folder goes under its final name, and what stood there is never harmed."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from converters.errors import ResourceError, UsageError
from exporters.base import Target
from tundish import publish as publishing
from tundish.exchange import exchange
from tundish.manifest_file import FORMAT
from tundish.publish import left_by_killed, publish, reclaim, reject, require_replaceable, restore, staging
from tundish.signals import deferred_signals

ROOT = Path(__file__).resolve().parents[2]


def old_build(out: Path) -> None:
    (out / "gguf").mkdir(parents=True)
    (out / "gguf" / "model.gguf").write_text("old")
    (out / "report.md").write_text("old")
    manifest = {
        "format": FORMAT,
        "tundish": "0",
        "source": {
            **dict.fromkeys(["repo_id", "revision", "licence", "licence_name", "licence_link"]),
            "name": "m",
            "languages": [],
            "files": {"config.json": "00"},
        },
        "recipe": {"name": "r", "description": "a test"},
        "recipe_digest": "00",
        "context_length": 8,
        "weights": {"w": {"shape": [1], "scheme": "fp32"}},
        "calibration": None,
        "budget": None,
        "libraries": {},
        "targets": {
            "gguf": {
                "semantics": {"sentence": "context 8"},
                "bytes": 3,
                "files": {"model.gguf": {"bytes": 3, "sha256": "00"}},
                "documents": {},
            }
        },
        "verification": None,
        "documents": {},
    }
    (out / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a folder is replaced: as here, and as where names cannot be exchanged."""
    if request.param == "two renames":
        monkeypatch.setattr(publishing, "exchange", lambda one, other: False)
    elif sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")
    way: str = request.param
    return way


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


# ---- what killed builds leave ----

STAGE = """
import sys
from pathlib import Path
from tundish.publish import staging
with staging(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def a_build(out: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that is building into `out`, and its folder."""
    with subprocess.Popen(
        [sys.executable, "-c", STAGE, str(out)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().rstrip())
        finally:
            process.kill()


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "a [name] with späces"
    said: list[str] = []
    with a_build(out) as (process, folder):
        reclaim(out, said.append)
        assert (folder / "half").exists() and len(said) == 1
        assert said[0].startswith(f"left alone: {folder}") and "running" in said[0]
        process.kill()
        process.wait()
        reclaim(out.with_name("a"), said.append)
        assert (folder / "half").exists() and len(said) == 1, "that is of another --out"
        reclaim(out, said.append)
    assert not list(tmp_path.iterdir()) and said[1:] == [f"removed: {folder}, which a build that was killed had left"]


def test_what_may_be_in_use_or_precious_is_told_only(tmp_path: Path) -> None:
    machine = publishing._machine_of(tmp_path)
    other = "00000001" if machine != "00000001" else "00000002"
    names = [f".out.abcd_123.{other}.partial", f".out.abcd_123.{other}.old", ".out.abcd_123.partial"]
    silent = [".out.mine", ".out.abcd_123", f".out.x.abcd_123.{machine}.partial"]
    for name in names + silent:
        (tmp_path / name).mkdir()
    said: list[str] = []
    reclaim(tmp_path / "out", said.append)
    assert {path.name for path in tmp_path.iterdir()} == {*names, *silent}
    assert sorted(line.split(",")[0] for line in said) == sorted(f"left alone: {tmp_path / name}" for name in names)
    reclaim(tmp_path / "not" / "yet", said.append)
    assert len(said) == len(names)


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
@pytest.mark.parametrize("ending", ["partial", "old"])
def test_a_link_with_the_name_of_what_is_left_is_not_followed(tmp_path: Path, ending: str) -> None:
    precious, link = tmp_path / "precious", tmp_path / f".out.abcd_123.{publishing._machine_of(tmp_path)}.{ending}"
    precious.mkdir()
    link.symlink_to(precious)
    said: list[str] = []
    restore(tmp_path / "out", said.append)
    with left_by_killed(tmp_path / "out", said.append, lambda folder: True) as left:
        assert left is None
    assert said == [f"left alone: {link}, which is not a folder"] and link.is_symlink() and precious.is_dir()


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_lock", lambda folder: None)
    said: list[str] = []
    with staging(tmp_path / "out") as folder:
        monkeypatch.undo()
        reclaim(tmp_path / "out", said.append)
        assert folder.exists() and said[0].startswith(f"left alone: {folder}")
    assert not list(tmp_path.iterdir())


def publish_until_killed(out: Path, moment: int, finish: Callable[[Path], object]) -> None:
    """In a process of its own, which dies at that call of those that change something."""
    calls = itertools.count(1)

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    with staging(out) as folder:
        (folder / "new").write_text("new")
        for owner, name in ((publishing, "exchange"), (publishing, "sync"), (publishing, "_remove")):
            setattr(owner, name, killing(getattr(owner, name)))
        Path.rename = killing(Path.rename)  # type: ignore[method-assign]
        finish(folder)


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
def test_a_kill_while_publishing_loses_nothing(tmp_path: Path, way: str) -> None:
    """Wherever it comes, there is the old build or the new one after the next command, and nothing else."""
    for moment in range(1, 12):
        out = tmp_path / str(moment) / "out"
        old_build(out)
        child = os.fork()
        if child == 0:
            publish_until_killed(out, moment, partial(publish, out=out, targets=[Target.GGUF]))
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        if way == "exchange":
            assert out.is_dir(), "there is no moment without it"
        restore(out, print)
        reclaim(out, print)
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert [path.name for path in out.iterdir()] == ["new"] or (out / "gguf" / "model.gguf").read_text() == "old"
        if ended == 0:
            break
    assert ended == 0 and moment > 5


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
def test_a_kill_while_rejecting_publishes_nothing(tmp_path: Path, way: str) -> None:
    """What stood under the rejected name missed its gates as well: it comes back under that name, if at all."""
    for moment in range(1, 12):
        out = tmp_path / str(moment) / "out"
        rejected = out.with_name("out.rejected")
        old_build(rejected)
        child = os.fork()
        if child == 0:
            publish_until_killed(out, moment, partial(reject, rejected=rejected))
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        for name in (out, rejected):
            restore(name, print)
            reclaim(name, print)
        assert [path.name for path in out.parent.iterdir()] == ["out.rejected"]
        assert (rejected / "new").exists() or (rejected / "gguf" / "model.gguf").read_text() == "old"
        if ended == 0:
            break
    assert ended == 0 and moment > 5


def test_the_last_of_those_moved_away_comes_back(tmp_path: Path) -> None:
    """Kills between two renames left more than one, the last of which was the newest build."""
    for name in ("zzzzzzzz", "aaaaaaaa", "mmmmmmmm"):
        old_build(tmp_path / name)
        (tmp_path / name / "gguf" / "model.gguf").write_text(name)
        time.sleep(0.02)  # a file system's clock may be that coarse
        (tmp_path / name).rename(tmp_path / f".out.{name}.00000000.old")
    restore(tmp_path / "out", print)
    assert (tmp_path / "out" / "gguf" / "model.gguf").read_text() == "mmmmmmmm"


@pytest.mark.skipif(os.name == "nt", reason="POSIX users")
@pytest.mark.parametrize("ending", ["partial", "old"])
@pytest.mark.parametrize("whose", ["another user's", "anybody's"])
def test_what_others_can_have_written_becomes_no_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, whose: str
) -> None:
    out = tmp_path / "out"
    planted = tmp_path / f".out.abcd_123.{publishing._machine_of(tmp_path)}.{ending}"
    old_build(planted)
    if whose == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: 4001)
    else:
        planted.chmod(0o777)
    restore(out, print)
    with left_by_killed(out, print, lambda folder: True) as left:
        assert left is None
    assert not out.exists() and planted.exists() == (whose == "another user's")


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
def test_a_name_taken_by_a_killed_build_is_given_back(tmp_path: Path) -> None:
    out, said = tmp_path / "out", list[str]()
    aside = tmp_path / f".out.abcd_123.{publishing._machine_of(tmp_path)}.old"
    old_build(aside)
    restore(out, said.append)
    assert said == [f"restored: {out}, which a build that was killed had moved away"]
    assert (out / "gguf" / "model.gguf").read_text() == "old" and not aside.exists()
    old_build(aside)
    restore(out, said.append)
    assert aside.exists() and len(said) == 1, "the name is taken"
    (aside / "thesis.tex").write_text("precious")
    reclaim(out, said.append)
    assert (aside / "thesis.tex").exists() and "thesis.tex" in said[1], "somebody's file was in what was replaced"
    (aside / "thesis.tex").unlink()
    reclaim(out, said.append)
    assert not aside.exists()


def test_a_folder_that_is_worth_it_survives_a_signal(tmp_path: Path) -> None:
    for error, kept in ((KeyboardInterrupt, True), (SystemExit, True), (OSError, False)):
        with suppress(error), staging(tmp_path / "out", worth_keeping=lambda folder: True) as folder:
            raise error
        assert folder.exists() == kept
        with left_by_killed(tmp_path / "out", print, lambda folder: True) as left:
            assert left == (folder if kept else None)
            with staging(tmp_path / "out", left=left) as again:
                assert (again == folder) == kept
        assert not list(tmp_path.iterdir())


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
