"""Files of gigabytes past the page cache, where the system can do that.

What is written once and read once does not belong there: it evicts the checkpoint that is being read, and on virtual
machines, whose memory the host hands out page by page, filling the cache can cost as much processor time as quantizing.
Linux's O_DIRECT wants whole, aligned pages; a file system may refuse it.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import threading
from pathlib import Path

PAGE = 4096  # what every disk's direct transfers are aligned to
CHUNK = 4 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it
_buffers = threading.local()


def open_direct(path: Path, flags: int) -> int:
    """A file descriptor for direct transfers, to be closed by the caller; -1 where the system has none."""
    if not _DIRECT:
        return -1
    try:
        return os.open(path, flags | _DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return -1


def aligned_buffer() -> memoryview:
    """CHUNK bytes aligned to a page, which belong to this thread until its next call."""
    if not hasattr(_buffers, "pages"):
        _buffers.pages = memoryview(mmap.mmap(-1, CHUNK))
    pages: memoryview = _buffers.pages
    return pages


def sha256_past_cache(path: Path) -> str:
    """SHA-256 of a file that is unlikely to be in the cache, and not worth keeping there; in hex."""
    direct = open_direct(path, os.O_RDONLY)
    digest, offset = hashlib.sha256(), 0
    try:
        buffer = aligned_buffer()
        while direct >= 0 and (count := _read(direct, buffer, offset)):
            digest.update(buffer[:count])
            offset += count
            if count % PAGE:
                break  # the end of the file: the next read would begin inside a page
    finally:
        if direct >= 0:
            os.close(direct)
    with path.open("rb") as file:
        file.seek(offset)
        while rest := file.read(CHUNK):
            digest.update(rest)
    return digest.hexdigest()


def _read(file: int, buffer: memoryview, offset: int) -> int:
    """Bytes read; 0 at the end, and where a file system opens a file so but does not read it."""
    try:
        return os.preadv(file, [buffer], offset)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0
