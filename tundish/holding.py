"""One command at a time works on an output: whoever comes second is told who holds it, and waits."""

from __future__ import annotations

import errno
import json
import os
import platform
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from converters.errors import UsageError

if sys.platform != "win32":
    import fcntl

_NOTE_BYTES = 4096
_PATIENCE = 0.2  # seconds between two looks; a lock that is waited for by the system would hold up signals


@contextmanager
def holding(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold `out`, which need not be there, against other processes; waits for one that holds it already, and says so.

    The lock is on `.<name>.lock` beside `out`, a file that names its holder. It ends with the process, however that
    ends. Where no lock can be had, because of the system or because the folder may not be written to, there is none.
    """
    with ExitStack() as stack:
        if sys.platform != "win32" and out.name:  # the root folder has none
            stack.enter_context(_parents(out.parent))
            path = out.with_name(f".{out.name}.lock")
            lock = _acquire(path, out, say)
            if lock is not None:
                stack.callback(os.close, lock)
                stack.callback(_unlink, path)  # before the lock ends: whoever waits will see it gone
        yield


def _unlink(path: Path) -> None:
    with suppress(PermissionError):  # another user's, which stays for the next
        path.unlink(missing_ok=True)


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make the folder and those above it; at the end, remove those that are empty again."""
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]  # of a name too long as well
    with suppress(OSError):  # whoever writes there later is told
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            for each in missing:
                each.rmdir()


def _acquire(path: Path, out: Path, say: Callable[[str], None]) -> int | None:
    """A descriptor with the lock; None where there can be none."""
    told = ""
    while True:
        try:
            descriptor = _open(path)
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.ELOOP):
                raise _no_lock(path, error.strerror or str(error)) from error
            if isinstance(error, PermissionError) and os.path.lexists(path):
                say(f"warning: nothing keeps a second build of {out} off: another user's {path.name} cannot be read")
            return None  # whoever writes beside `out` is told why that cannot be
        try:
            if not _is_lock(descriptor):
                raise _no_lock(path, "something else")
            if _locked(descriptor):
                if _is_at(descriptor, path):
                    _sign(descriptor)
                    return descriptor
                os.close(descriptor)  # its holder has removed it: try the one that is there now
                continue
            holder = _holder(descriptor)
            os.close(descriptor)
        except OSError as error:  # a file system without locks
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
            say(f"warning: nothing keeps a second build of {out} off: no locks there ({error.strerror or error})")
            return None
        except BaseException:
            os.close(descriptor)
            raise
        if holder != told:
            say(f"waiting for {out}, which {holder} holds")
            told = holder
        time.sleep(_PATIENCE)


def _open(path: Path) -> int:
    """The lock's file, made if there is none; another user's to read, which is enough for a lock."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _no_lock(path: Path, found: str) -> UsageError:
    return UsageError(
        "what lies where a build's lock would be is none",
        where=str(path),
        expected="no file, or one that names its holder",
        found=found,
        mend="Move it away, or choose another --out.",
    )


def _is_lock(descriptor: int) -> bool:
    """Whether it is a file of ours, which may be written to: empty, or with a note, and of one name."""
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1 or state.st_size > _NOTE_BYTES:
        return False
    note = os.pread(descriptor, _NOTE_BYTES, 0)
    return not note or note.startswith(b'{"pid": ')


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write down who holds the lock, for people; without room for that, they are told less."""
    note = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(note).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        note = json.loads(os.pread(descriptor, _NOTE_BYTES, 0))
        return f"process {note['pid']} on {note['host']} since {note['since']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
