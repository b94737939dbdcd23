"""What builds leave that are killed, wherever that is, and what the next command does with it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from exporters.base import Target
from tests.tundish.old_build import old_build
from tundish import publish as publishing
from tundish.publish import left_by_killed, publish, reclaim, reject, restore, staging

ROOT = Path(__file__).resolve().parents[2]


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
