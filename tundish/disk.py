"""What a disk refuses, told so that a user can mend it. A module of its own, light enough for the command line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.errors import ResourceError

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
