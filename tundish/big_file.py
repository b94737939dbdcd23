"""Writing a file of gigabytes in any order, past the page cache where the system can do that (converters.direct_io).

Its SHA-256 is taken on the way. What is written next to what was hashed last is hashed from memory, then whatever lies
behind it: a few megabytes that came early and were kept, and more than that is read again from the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from threading import Lock

from converters.direct_io import CHUNK, PAGE, aligned_buffer, open_direct

KEPT = 8 << 20  # bytes of a file that are kept for its digest until it is their turn
_WORTH_IT = 16 * PAGE  # below that, a transfer of its own costs more than a copy into the cache


class BigFileWriter:
    """A file of exactly `nbytes`, its space reserved. Threads may write to it at the same time, every byte once.

    It is a new one, or with `again` one that an earlier writer left, from which what is as it should be may be kept.
    Data handed to `write` must stay as it is until the file is closed. Whole pages go straight to the disk; the few
    bytes before the first and after the last page of a write, which a neighbour shares, go through the cache.
    """

    def __init__(self, path: Path, nbytes: int, again: bool = False) -> None:
        self._file = os.open(path, os.O_RDWR | (os.O_NOFOLLOW if again else os.O_CREAT | os.O_EXCL), 0o644)
        self._direct = -1
        self._path = path
        self._nbytes = nbytes
        self._again = again
        self._digest = hashlib.sha256()
        self._hashed = 0  # bytes from the start
        self._early: dict[int, memoryview | int] = {}  # written beyond: the data or only how much, by offset
        self._kept = 0
        self._lock = Lock()  # of the three above and the next
        self._hashing = False
        try:
            if again:
                os.ftruncate(self._file, nbytes)
            if nbytes:
                os.posix_fallocate(self._file, 0, nbytes)
            self._direct = open_direct(path, os.O_WRONLY)
        except BaseException:
            self.close()
            raise

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of data (bytes) at the offset."""
        self._write(data, offset)
        if data:
            self._hash(data, offset)

    def leave(self, nbytes: int, offset: int) -> None:
        """Nothing will be written there: these bytes are zeros."""
        if self._again:
            for start in range(offset, offset + nbytes, CHUNK):
                _write_all(self._file, memoryview(bytes(min(CHUNK, offset + nbytes - start))), start)
        self._hash(nbytes, offset)

    def read(self, nbytes: int, offset: int) -> memoryview:
        """What is in the file."""
        return memoryview(_read_all(self._file, nbytes, offset))

    def keep(self, data: memoryview, offset: int) -> None:
        """These bytes, which were read at the offset, stay."""
        if data:
            self._hash(data, offset)

    def sha256(self) -> str:
        """Of the whole file, in hex. Every byte must have been written, or left. OSError if its name is gone."""
        assert self._hashed == self._nbytes, (self._hashed, self._nbytes)
        if not os.path.samestat(self._path.stat(), os.fstat(self._file)):
            raise FileNotFoundError(errno.ENOENT, "another file took its name", str(self._path))
        return self._digest.hexdigest()

    def _hash(self, data: memoryview | int, offset: int) -> None:
        """Hash all that has its turn now, unless another thread is at it and will find this too."""
        with self._lock:
            if isinstance(data, memoryview):
                self._kept += len(data)
                if self._kept > KEPT and offset != self._hashed:
                    self._kept -= len(data)
                    data = len(data)
            self._early[offset] = data
            if self._hashing:
                return
            self._hashing = True
        while True:
            with self._lock:
                following = self._early.pop(self._hashed, None)
                if following is None:
                    self._hashing = False
                    return
            nbytes = self._update(following)
            with self._lock:
                self._hashed += nbytes
                self._kept -= nbytes if isinstance(following, memoryview) else 0

    def _update(self, data: memoryview | int) -> int:
        """Hash what comes next: given, or so many bytes of the file."""
        if isinstance(data, memoryview):
            self._digest.update(data)
            return len(data)
        stop = self._hashed + data
        for start in range(self._hashed, stop, CHUNK):
            self._digest.update(_read_all(self._file, min(CHUNK, stop - start), start))
        return data

    def _write(self, data: memoryview, offset: int) -> None:
        head = min(-offset % PAGE, len(data))
        body = (len(data) - head) // PAGE * PAGE
        if self._direct < 0 or body < _WORTH_IT:
            _write_all(self._file, data, offset)
            return
        _write_all(self._file, data[:head], offset)
        self._write_pages(data[head : head + body], offset + head)
        _write_all(self._file, data[head + body :], offset + head + body)

    def _write_pages(self, data: memoryview, offset: int) -> None:
        buffer = aligned_buffer()
        while data:
            count = min(len(data), CHUNK)
            buffer[:count] = data[:count]
            written = _write_direct(self._direct, buffer[:count], offset)
            if not written or written % PAGE:
                _write_all(self._file, data, offset)
                return
            data, offset = data[written:], offset + written

    def close(self) -> None:
        """Close the file; no write may be under way."""
        for file in (self._file, self._direct):
            if file >= 0:
                os.close(file)
        self._file = self._direct = -1


def _write_direct(file: int, data: memoryview, offset: int) -> int:
    """Bytes written; 0 where a file system opens a file for direct transfers but takes none."""
    try:
        return os.pwrite(file, data, offset)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _read_all(file: int, nbytes: int, offset: int) -> bytes:
    data = os.pread(file, nbytes, offset)
    while len(data) < nbytes:
        more = os.pread(file, nbytes - len(data), offset + len(data))
        if not more:
            raise OSError(errno.EIO, "the file became shorter while it was written")
        data += more
    return data
