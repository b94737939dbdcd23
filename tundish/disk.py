"""Files that are written whole or not at all, and what a disk refuses, told so that a user can mend it.

A module of its own, light enough for the command line.
"""

from __future__ import annotations

import errno
import glob
import os
import secrets
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from converters.errors import ResourceError

_TOKEN, _READY = "[0-9a-f]" * 8, ".ready"
IN_PLACE = "Free space there, or have the folder be one that you may write to; then say the same again."


@contextmanager
def disk_errors(folder: Path, mend: str | None = None) -> Iterator[None]:
    """Turn an OSError below into a ResourceError that says what is needed: of --out, unless another `mend` is given."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        mend = mend or {
            errno.ENOSPC: "Free space or choose another --out; `tundish plan` prints what is needed.",
            errno.EDQUOT: "The quota is used up; choose another --out.",
            errno.EACCES: "Choose an --out that you may write to.",
            errno.EROFS: "The file system is read-only; choose another --out.",
            errno.ENAMETOOLONG: "Choose a shorter --out: during a build, its folder's name is 27 characters longer.",
        }.get(error.errno or 0, "Check the disk and the permissions of --out.")
        where = str(error.filename or folder)
        raise ResourceError(f"cannot write: {error.strerror or error}", where=where, mend=mend) from error


@contextmanager
def naming_need(nbytes: int) -> Iterator[None]:
    """Say with a full disk below how many bytes the build takes: what was free when it began, something else took."""
    try:
        yield
    except ResourceError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        parts = {"where": error.where, "expected": f"{nbytes:,} bytes for the whole build", "mend": error.mend}
        raise ResourceError(error.what, **parts) from cause


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """The same where `folder`, which is in the cache, is written to."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"cannot write to the cache: {error.strerror or error}",
            where=str(folder),
            mend="Free space there, which `tundish cache gc` does, or set TUNDISH_CACHE to a folder on another disk.",
        ) from error


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all: one that was there is replaced once this one is on the disk."""
    replace_files({path: data})


def replace_files(files: Mapping[Path, bytes], together: Path | None = None) -> None:
    """The same with several, once all of them are on the disk, by way of temporary ones.

    An error before that leaves nothing of these behind; a kill may. With a folder `together`, a mark there says from
    then on that all have to be replaced: `finish_replacing` does what a kill kept from happening.
    """
    token = secrets.token_hex(4)  # others may be at the same files
    ready: list[tuple[Path, Path]] = []
    try:
        for path, data in files.items():
            temporary = path.with_name(f".{path.name}.{token}.new")
            with temporary.open("xb") as file:
                ready.append((temporary, path))
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        folders = {path.parent for path in files}
        if together is not None:
            for folder in folders:
                sync(folder)
            _mark(together, token).touch(exist_ok=False)
            sync(together)
    except BaseException:
        for temporary, _ in ready:
            with suppress(OSError):  # what went wrong first is told
                temporary.unlink(missing_ok=True)
        raise
    for temporary, path in ready:
        temporary.replace(path)
    for folder in folders:
        sync(folder)
    if together is not None:
        _mark(together, token).unlink()


def finish_replacing(files: Collection[Path], together: Path) -> None:
    """Replace the files that a killed process had still to replace, and remove what it had not all ready.

    A living one must not be at them.
    """
    marks = {mark.name[1 : -len(_READY)]: mark for mark in together.glob(f".{_TOKEN}{_READY}") if _is_file(mark)}
    for path in files:
        for temporary in _temporaries(path):
            if temporary.name.split(".")[-2] in marks:
                temporary.replace(path)
            else:
                temporary.unlink()
    for folder in {path.parent for path in files} if marks else ():
        with suppress(FileNotFoundError):
            sync(folder)
    for mark in marks.values():
        mark.unlink()


def drop_unready(path: Path) -> None:
    """Remove the temporary files of a `replace_file` that was killed, and replace nothing by them.

    A living one must not be at them.
    """
    for temporary in _temporaries(path):
        temporary.unlink()


def _temporaries(path: Path) -> list[Path]:
    return [each for each in path.parent.glob(f".{glob.escape(path.name)}.{_TOKEN}.new") if _is_file(each)]


def _mark(folder: Path, token: str) -> Path:
    return folder / f".{token}{_READY}"


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def put_in_place(made: Path, path: Path) -> None:
    """Give a file that is whole its name on the same file system, once it is on the disk."""
    sync(made)
    made.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's contents, or the names in a folder, on the disk."""
    if sys.platform == "win32":  # where no folder can be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
