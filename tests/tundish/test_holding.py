"""Whoever comes second waits for an output that is held, is told by whom, and gets it once the holder is gone."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from converters.errors import UsageError
from tundish import holding as module
from tundish.holding import holding

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from tundish.holding import holding
with holding(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.readline()
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX locks")


@contextmanager
def holder(out: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("end", ["it ends", "it is killed"])
def test_the_second_waits_and_is_told_for_whom(tmp_path: Path, end: str) -> None:
    out, said, held = tmp_path / "not" / "yet", list[str](), threading.Event()
    out.parent.mkdir()

    def wait() -> None:
        with holding(out, said.append):
            held.set()

    with holder(out) as process:
        waiting = threading.Thread(target=wait)
        waiting.start()
        while not said:
            time.sleep(0.01)
        assert not held.wait(0.5)
        assert said[0].startswith(f"waiting for {out}, which process {process.pid} on ") and len(said) == 1
        if end == "it ends":
            process.communicate("\n")
        else:
            process.kill()
        assert held.wait(20)
        waiting.join()
    assert not list(out.parent.iterdir())


def test_folders_that_were_not_needed_go(tmp_path: Path) -> None:
    with holding(tmp_path / "not" / "yet" / "out", pytest.fail):
        assert (tmp_path / "not" / "yet" / ".out.lock").exists()
    assert not list(tmp_path.iterdir())


def test_many_take_turns(tmp_path: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(5):
            with holding(tmp_path / "out", lambda text: None):
                inside += 1
                most = max(most, inside)
                time.sleep(0.002)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and not list(tmp_path.iterdir())


def test_another_output_is_free(tmp_path: Path) -> None:
    with holder(tmp_path / "out"), holding(tmp_path / "other", pytest.fail):
        pass


def test_a_signal_ends_the_wait(tmp_path: Path) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with holder(tmp_path / "out") as process:
        with pytest.raises(KeyboardInterrupt), holding(tmp_path / "out", interrupt):
            raise AssertionError("held twice")
        assert process.poll() is None and (tmp_path / ".out.lock").exists()


@pytest.mark.parametrize("note", [b"", b"[]", b"{}", b"\xff"])
def test_a_holder_that_left_no_name(tmp_path: Path, note: bytes) -> None:
    (tmp_path / "note").write_bytes(note)
    with (tmp_path / "note").open("rb") as file:
        assert module._holder(file.fileno()) == "another process"


def test_where_no_lock_can_be_made_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with holding(tmp_path / "file" / "out", pytest.fail):
        assert (tmp_path / "file").read_bytes() == b""


def test_another_users_lock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be read only, and stays where it is."""
    opened, unlink = os.open, Path.unlink

    def refuse(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *mode)

    def keep(self: Path, missing_ok: bool = False) -> None:
        if self.name == ".out.lock":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(self))
        unlink(self, missing_ok)

    said: list[str] = []

    def tell(text: str) -> None:
        said.append(text)
        process.stdin.close()  # type: ignore[union-attr]  # whereupon it ends

    with holder(tmp_path / "out") as process:
        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr(Path, "unlink", keep)
        with holding(tmp_path / "out", tell):
            pass
        assert f"process {process.pid}" in said[0]


def test_a_lock_that_cannot_be_read_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *arguments: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / ".out.lock").touch()
    monkeypatch.setattr(os, "open", refuse)
    said: list[str] = []
    with holding(tmp_path / "out", said.append):
        pass
    what = f"warning: nothing keeps a second build of {tmp_path / 'out'} off"
    assert said == [f"{what}: another user's .out.lock cannot be read"]


def test_a_file_system_without_locks_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    said: list[str] = []
    with holding(tmp_path / "out", said.append):
        assert not list(tmp_path.iterdir())
    assert said == [
        f"warning: nothing keeps a second build of {tmp_path / 'out'} off: no locks there (No locks available)"
    ]


@pytest.mark.parametrize("kind", ["file", "second name", "link", "folder", "pipe"])
def test_what_is_no_lock_is_left_as_it_is(tmp_path: Path, kind: str) -> None:
    lock, other = tmp_path / ".out.lock", tmp_path / "precious"
    other.write_text("precious")
    if kind == "file":
        lock.write_text("precious")
    elif kind == "second name":
        lock.hardlink_to(other)
    elif kind == "link":
        lock.symlink_to(other)
    elif kind == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    with pytest.raises(UsageError, match="lock would be is none"), holding(tmp_path / "out", print):
        pass
    assert other.read_text() == "precious" and os.path.lexists(lock)
    assert kind != "file" or lock.read_text() == "precious"
