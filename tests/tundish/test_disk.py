"""Files are replaced whole or not at all, and nothing temporary is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tundish.disk import put_in_place, remove_left, replace_file, replace_files


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
    remove_left(tmp_path / "a")
    assert {path.name for path in tmp_path.iterdir()} == {"a"} | theirs
    remove_left(tmp_path / "absent" / "a")


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
