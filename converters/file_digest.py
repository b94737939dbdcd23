"""Digests of files, several at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from converters.errors import ModelError
from converters.json_file import regular_size

_CHUNK = 1 << 20


def sha256_of(paths: Iterable[Path], threads: int = 1) -> dict[Path, str]:
    """SHA-256 of each file, in hex. ModelError if one cannot be read."""
    with digesting(paths, threads) as digests:
        return digests.result()


class Digests:
    """SHA-256 of files, being taken."""

    def __init__(self, paths: Iterable[Path], pool: ThreadPoolExecutor, stop: Event) -> None:
        self._digests = {path: pool.submit(_sha256, path, stop) for path in _largest_first(paths)}

    def done(self) -> bool:
        """Whether all are taken, so that `result` need not wait."""
        return all(digest.done() for digest in self._digests.values())

    def result(self) -> dict[Path, str]:
        """Of each file, in hex, when all are done. ModelError if one cannot be read."""
        return {path: digest.result() for path, digest in self._digests.items()}


@contextmanager
def digesting(paths: Iterable[Path], threads: int = 1) -> Iterator[Digests]:
    """Take the digests while the body runs. What is not done when it ends is given up.

    ModelError, before the body runs, if a file cannot be opened: the digests may be asked for much later.
    """
    stop = Event()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="digest")
    try:
        yield Digests(paths, pool, stop)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _largest_first(paths: Iterable[Path]) -> list[Path]:
    """So that no thread is left with a large file at the end."""
    return sorted(paths, key=_openable_size, reverse=True)


def _openable_size(path: Path) -> int:
    """Bytes of a file that can be opened."""
    with reading(path):
        size = regular_size(path)  # before opening, which waits for whoever writes to a pipe
        with path.open("rb"):
            return size


def _sha256(path: Path, stop: Event) -> str:
    """Half a digest if it is told to stop: nobody asks for it then."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with reading(path), path.open("rb", buffering=0) as file:
        while not stop.is_set() and (count := file.readinto(buffer)):
            digest.update(buffer[:count])
    return digest.hexdigest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """ModelError that names the file, or the one in this folder, for what the system says below."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            "file cannot be read",
            where=str(error.filename or path),
            found=error.strerror or str(error),
            mend="It is missing, damaged or not yours to read: see its permissions and the disk.",
        ) from error
