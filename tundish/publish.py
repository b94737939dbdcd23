"""Puts a finished folder under its final name, and never harms what stood there."""

from __future__ import annotations

import errno
import glob
import itertools
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from converters.errors import UsageError
from exporters.base import Target
from tundish.disk import disk_errors, sync
from tundish.exchange import exchange, is_local
from tundish.journal import JOURNAL
from tundish.manifest_file import MANIFEST, PAPERS, artifact_files, finish_papers, read_manifest
from tundish.signals import deferred_signals

if sys.platform != "win32":
    import fcntl

_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"


def require_replaceable(out: Path, targets: Iterable[Target]) -> None:
    """UsageError unless `out` is absent, empty, or a build of these targets or fewer that nobody added to."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError("--out is not a folder", where=str(out), mend="Choose another name.")
    if out.is_mount():
        raise UsageError(
            "--out is a mount point, which no rename can replace", where=str(out), mend="Choose a folder in it."
        )
    present = files_in(out)
    if not present:
        return
    if MANIFEST not in present:
        raise UsageError(
            "--out holds files that tundish did not write", where=str(out), mend="Choose another folder, or empty it."
        )
    lost = sorted({name.split("/", 1)[0] for name in _written(out / MANIFEST)} - set(targets))
    if lost:
        raise UsageError(
            f"--out holds artifacts that this build would remove: {', '.join(lost)}",
            where=str(out),
            mend="Build all targets of the recipe, or choose another --out.",
        )
    foreign = sorted(present - _written(out / MANIFEST) - PAPERS)
    if foreign:
        raise UsageError(
            "--out holds files beside the artifacts, and a new build would replace the folder",
            where=str(out),
            found=", ".join(foreign[:5]) + (" …" if len(foreign) > 5 else ""),
            mend="Move them away, or choose another --out.",
        )


def require_name(out: Path) -> None:
    """ResourceError if what `staging` makes beside `out` can have no such name."""
    with disk_errors(out), suppress(FileNotFoundError, NotADirectoryError):
        out.with_name(f".{out.name}.{'x' * 8}.{_MACHINE}.partial").lstat()


def files_in(folder: Path) -> set[str]:
    """Relative names of everything below a folder that is no folder itself; links are not followed.

    UsageError if a folder cannot be looked into.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(
            "cannot look into the folder",
            where=str(error.filename or folder),
            found=str(error.strerror or error),
            mend="Choose another, or make this one readable.",
        ) from error

    found: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=refuse):
        paths = [Path(parent, name) for name in files]
        paths += [path for path in (Path(parent, name) for name in folders) if path.is_symlink()]
        found.update(path.relative_to(folder).as_posix() for path in paths)
    return found


def _written(manifest: Path) -> set[str]:
    return {*artifact_files(read_manifest(manifest.parent))}


@contextmanager
def staging(
    out: Path,
    errors: Callable[[Path], AbstractContextManager[None]] = disk_errors,
    left: Path | None = None,
    worth_keeping: Callable[[Path], bool] = lambda folder: False,
) -> Iterator[Path]:
    """A new folder beside `out`, on the same file system, or the one that `reclaim` found to be `left`.

    It is locked for as long as this process lives, so that `reclaim` can tell whose it is. It is removed at the end if
    it is still there, unless a signal ends the body and it is `worth_keeping`. `errors` turns an OSError into what
    users are told.
    """

    def end(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not (isinstance(error, (SystemExit, KeyboardInterrupt)) and worth_keeping(folder)):
            _remove(folder)

    with ExitStack() as stack:
        if left is None:
            with errors(out), deferred_signals():
                folder = _new_folder(out, stack)
                stack.push(end)
        else:
            folder = left
            stack.push(end)
        yield folder


def _new_folder(out: Path, stack: ExitStack) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    stack.callback(_remove, made)
    made.chmod(0o755)  # mkdtemp's 0700 would stay with the published folder
    lock = _lock(made)
    if lock is not None:
        stack.callback(os.close, lock)
    # Only now it has a name that `reclaim` knows, and one that it may remove only if there is a lock.
    ending = ".partial" if lock is None else f".{_machine_of(made)}.partial"
    return made.rename(made.with_name(made.name + ending))


def _machine_of(folder: Path) -> str:
    """By which machine's processes the locks of a folder can be seen; one answer for any on a disk of its own.

    A container has another name each time, and finds on its volume what the last one left.
    """
    return f"{0:08x}" if is_local(folder) else _MACHINE


def discard(folder: Path) -> None:
    """Remove a folder that `left_by_killed` gave."""
    _remove(folder)


def _remove(folder: Path) -> None:
    with deferred_signals():
        shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed is told by the next build's `reclaim`


def is_plain(path: Path) -> bool:
    """Whether that is a file of one name: no folder, link or pipe, and not another's file as well."""
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def remove_any(path: Path) -> None:
    """Remove whatever it is, a folder with all that is in it; links are not followed."""
    if not stat.S_ISDIR(path.lstat().st_mode):
        path.unlink()
        return
    path.chmod(0o700)  # or what is in it might not be ours to remove
    for parent, names, _ in os.walk(path):
        for folder in (Path(parent, name) for name in names):
            if not folder.is_symlink():
                folder.chmod(0o700)
    shutil.rmtree(path)


def _lock(folder: Path) -> int | None:
    """A descriptor with the folder's lock, which ends with this process; None if another has it or nothing can.

    OSError if it is no folder, or a link to one.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def restore(out: Path, say: Callable[[str], None]) -> None:
    """Give `out` its name back, which a build that was killed while it published had taken from it.

    And finish the papers in it, at which a command was killed. Of several, it is the last that got its other name.
    """
    if os.path.lexists(out):
        finish_papers(out)
        return
    aside = [path for path, _, ending in _left_beside(out) if ending == "old" and _is_ours(path)]
    for path in sorted(aside, key=lambda path: path.lstat().st_ctime_ns)[-1:]:
        with disk_errors(out):
            path.rename(out)
        say(f"restored: {out}, which a build that was killed had moved away")


def reclaim(out: Path, say: Callable[[str], None]) -> None:
    """Remove what builds of `out` left beside it when they were killed. What may be of a living one is told only."""
    with ExitStack() as stack:
        _reclaim(out, say, lambda folder: False, stack)


@contextmanager
def left_by_killed(
    out: Path, say: Callable[[str], None], keep: Callable[[Path], bool] = lambda folder: False
) -> Iterator[Path | None]:
    """The same for whoever holds `out`, but for one folder that is to be kept: the body has that, locked."""
    if sys.platform != "win32":
        with suppress(OSError):  # no such folder, and none can be: whoever writes there later is told
            begun = [*out.parent.glob(f".{glob.escape(out.name)}.????????")]
            for path in begun:
                with suppress(OSError):  # with anything in it, it is none whose maker was killed before it had a lock
                    path.rmdir()
    with ExitStack() as stack:
        yield _reclaim(out, say, keep, stack)


def _reclaim(out: Path, say: Callable[[str], None], keep: Callable[[Path], bool], stack: ExitStack) -> Path | None:
    """Remove what is left but for the first that is to be kept, whose lock is the stack's."""
    kept = None
    for path, machine, ending in _left_beside(out):
        if path.is_symlink() or not path.is_dir():
            say(f"left alone: {path}, which is not a folder")
            continue
        if sys.platform != "win32" and path.lstat().st_uid != os.geteuid():
            say(f"left alone: {path}, which is another user's")
            continue
        lock = _lock_if_left(path) if machine == _machine_of(path) else None
        if lock is None:
            say(f"left alone: {path}, of a build that is running or that was killed on another machine")
        elif kept is None and ending == "partial" and _is_ours(path) and keep(path):
            kept = path
            stack.callback(os.close, lock)
        else:
            _remove_left(path, lock, say)
    return kept


def _left_beside(out: Path) -> list[tuple[Path, str, str]]:
    """What is named as folders of builds of `out`, in that order: each with its machine and `partial` or `old`."""
    # `rejected` is no random part, but the name of what `reject` replaces.
    left = re.compile(rf"\.{re.escape(out.name)}\.(?!rejected\.)[a-z0-9_]{{8}}(?:\.([0-9a-f]{{8}}))?\.(partial|old)")
    try:
        found = sorted((path, match) for path in out.parent.iterdir() if (match := left.fullmatch(path.name)))
    except OSError:
        return []  # no such folder yet, or one that cannot be read; whether it can be written to is asked later
    return [(path, match[1] or "", match[2]) for path, match in found]


def _is_ours(folder: Path) -> bool:
    """Whether nobody but this user can have written into a folder, whose contents may become a build of theirs."""
    status = folder.lstat()
    owned = sys.platform == "win32" or status.st_uid == os.geteuid()
    return stat.S_ISDIR(status.st_mode) and owned and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _lock_if_left(folder: Path) -> int | None:
    try:
        return _lock(folder)
    except OSError:  # its build has just ended, or it is another user's
        return None


def _remove_left(folder: Path, lock: int, say: Callable[[str], None]) -> None:
    """Remove a folder, unless it was replaced and somebody had put files into it just then; give up its lock."""
    try:
        if (folder / MANIFEST).exists() and not (folder / JOURNAL).exists():
            require_replaceable(folder, Target)
        _remove(folder)
    except UsageError as error:
        say(f"left alone: {folder}, which a build that was killed had left: {error.what}: {error.found}")
        return
    finally:
        os.close(lock)
    if os.path.lexists(folder):
        say(f"left alone: {folder}, which a build that was killed had left and which cannot be removed")
    else:
        say(f"removed: {folder}, which a build that was killed had left")


def publish(folder: Path, out: Path, targets: Collection[Target]) -> None:
    """Rename `folder`, which `staging` made, to `out`, and remove what stood there.

    UsageError if that may not be replaced (`require_replaceable`), which it might have been when the build began; the
    folder then gets a free name beside it. No signal comes between: either all of this is done or nothing.
    """
    with deferred_signals():
        try:
            _exchange(folder, out, targets)
        except UsageError as error:
            kept = _keep(folder, out.with_name(out.name + ".new"))
            raise UsageError(
                "--out changed during the build, and what is there now stays",
                where=str(out),
                found=f"{error.what}: {error.found}" if error.found else error.what,
                mend=f"What was built is in {kept}.",
            ) from error


def reject(folder: Path, rejected: Path) -> Path:
    """Rename `folder` to `rejected`, or to a free name if that may not be replaced. Returns its name."""
    with deferred_signals():
        try:
            _exchange(folder, rejected, tuple(Target))
        except UsageError:
            return _keep(folder, rejected)
        return rejected


def _exchange(folder: Path, out: Path, targets: Collection[Target]) -> None:
    """Rename `folder` to `out`, and remove what stood there if it may be replaced; else UsageError, and all stays.

    A kill finds the old folder under that name or the new one. Only where names cannot be exchanged there is a moment
    at which it finds none, and the next build gives the old one its name back (`restore`).
    """
    with disk_errors(out):
        require_replaceable(out, targets)
        _sync(folder)
        _complete(folder)
        if os.path.lexists(out) and exchange(folder, out):
            try:
                require_replaceable(folder, targets)  # nothing can have come to it under its name since
            except BaseException:
                exchange(folder, out)
                raise
        else:
            _rename_twice(folder, out, targets)
        sync(out.parent)
        _remove(folder)


def _rename_twice(folder: Path, out: Path, targets: Collection[Target]) -> None:
    """Rename `folder` to `out`, and what stood there to `folder`, a name that says that it may be removed.

    In between it has a name that says whose it is: `restore` gives it back to `out` alone.
    """
    unique = re.fullmatch(r".*?((?:\.[a-z0-9_]{8}){1,2})\.partial", folder.name)
    assert unique is not None, folder
    aside = out.with_name(f".{out.name}{unique[1]}.old")
    try:
        if os.path.lexists(out):
            out.rename(aside)
            require_replaceable(aside, targets)
        folder.rename(out)
    except BaseException as error:
        if os.path.lexists(aside) and not os.path.lexists(out):
            aside.rename(out)
        if isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise UsageError("another took the name", where=str(out)) from error
        raise
    if os.path.lexists(aside):
        aside.rename(folder)


def _sync(folder: Path) -> None:
    """Have everything in a folder on the disk: what it replaces will be gone, should the power fail."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))


def _complete(folder: Path) -> None:
    """Remove the journal. Only now: syncing takes seconds, and a build killed by then goes on from it."""
    (folder / JOURNAL).unlink(missing_ok=True)
    sync(folder)


def _keep(folder: Path, name: Path) -> Path:
    """Rename `folder` to `name`, or with the first number behind it that is free. Returns the new name."""
    with disk_errors(name):
        _complete(folder)
        names = (name.with_name(f"{name.name}{number}") for number in itertools.count(2))
        free = next(each for each in itertools.chain([name], names) if not os.path.lexists(each))
        return folder.rename(free)
