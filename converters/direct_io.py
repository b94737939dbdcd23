"""Files of gigabytes past the page cache, where the system can do that.

What is written once and read once does not belong there: it evicts the checkpoint that is being read, and on virtual
machines, whose memory the host hands out page by page, filling the cache can cost as much processor time as quantizing.
Linux's O_DIRECT wants whole, aligned pages; a file system may refuse it.
"""

from __future__ import annotations

import errno
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
