"""Files are replaced whole or not at all, and nothing temporary is left."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish.disk import finish_replacing, put_in_place, replace_file, replace_files


def test_replacing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    replace_files({tmp_path / "a": b"new", tmp_path / "b": b""})
    (tmp_path / "made").write_bytes(b"newest")
    put_in_place(tmp_path / "made", tmp_path / "a")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"newest", "b": b""}
    umask = os.umask(0o022)
    os.umask(umask)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o666 & ~umask, "as any file"


@pytest.mark.parametrize("moment", [1, 2])
def test_what_the_disk_refuses_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == moment:
            raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_files({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    theirs = {".a.01234567.old", ".a.0123456.new", ".ab.01234567.new", "a.new", ".a.zzzzzzzz.new", ".a.0000000f.new"}
    for name in {".a.01234567.new", "a"} | theirs - {".a.0000000f.new"}:
        (tmp_path / name).touch()
    (tmp_path / ".a.0000000f.new").symlink_to("a")
    finish_replacing([tmp_path / "a"], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a"} | theirs
    finish_replacing([tmp_path / "absent" / "a"], tmp_path / "absent")


@pytest.mark.skipif(os.name == "nt", reason="fork")
def test_a_kill_at_any_moment_leaves_all_or_nothing_of_what_belongs_together(tmp_path: Path) -> None:
    for moment in range(1, 20):
        folder = tmp_path / str(moment)
        (folder / "in").mkdir(parents=True)
        files = [folder / "a", folder / "in" / "b"]
        for path in files:
            path.write_bytes(b"old")
        child = os.fork()
        if child == 0:
            kill_at(moment)
            replace_files(dict.fromkeys(files, b"new"), together=folder)
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        finish_replacing(files, folder)
        assert {path.read_bytes() for path in files} in ({b"old"}, {b"new"}), moment
        assert sorted(folder.rglob("*")) == sorted([*files, folder / "in"])
        if ended == 0:
            break
    assert ended == 0 and moment > 8


def kill_at(moment: int) -> None:
    """At that call of those that change something."""
    calls = itertools.count(1)

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **names: Any) -> Any:
            if next(calls) == moment:
                os._exit(1)
            return function(*arguments, **names)

        return call

    os.fsync = killing(os.fsync)
    for name in ("open", "replace", "touch", "unlink"):
        setattr(Path, name, killing(getattr(Path, name)))


def test_two_at_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is about to give its file the name when the other begins and ends."""
    replace = Path.replace

    def slow(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        replace_file(tmp_path / "a", b"other")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", slow)
    replace_file(tmp_path / "a", b"one")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"one"]
