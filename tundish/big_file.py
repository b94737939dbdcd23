"""Writing a file of gigabytes in any order, past the page cache where the system can do that (converters.direct_io)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from converters.direct_io import CHUNK, PAGE, aligned_buffer, open_direct

_WORTH_IT = 16 * PAGE  # below that, a transfer of its own costs more than a copy into the cache


class BigFileWriter:
    """A new file of exactly `nbytes`, its space reserved. Threads may write to it at the same time.

    Whole pages go straight to the disk; the few bytes before the first and after the last page of a write, which a
    neighbour shares, go through the cache.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._direct = -1
        try:
            if nbytes:
                os.posix_fallocate(self._file, 0, nbytes)
            self._direct = open_direct(path, os.O_WRONLY)
        except BaseException:
            self.close()
            raise

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of data (bytes) at the offset."""
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
