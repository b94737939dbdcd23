"""Two names are exchanged in one step, and a file system is told to be local only where that is certain."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from tundish import exchange as module
from tundish.exchange import exchange, is_local

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="renameat2 and mountinfo are Linux's")


def test_names_are_exchanged(tmp_path: Path) -> None:
    one, other = tmp_path / "ünïcode one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / folder.name).touch()
    assert exchange(one, other)
    assert [path.name for path in one.iterdir()] == ["other"] and [path.name for path in other.iterdir()] == [one.name]


def test_a_name_that_is_absent(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "absent")
    assert (tmp_path / "one").is_dir()


def test_where_names_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old C library has no such call; a flag that the system does not know is what a file system without it says."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(module, "_EXCHANGE", 1 << 20)
    assert not exchange(tmp_path / "one", tmp_path / "other")
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: object())
    assert not exchange(tmp_path / "one", tmp_path / "other")


def test_local_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_local(Path("/proc")) and not is_local(tmp_path / "absent")
    monkeypatch.setattr(module, "_LOCAL", frozenset({"proc"}))
    assert is_local(Path("/proc")) and not is_local(tmp_path)
