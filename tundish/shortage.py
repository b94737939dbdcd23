"""How a shortage of memory shows."""

from __future__ import annotations

import errno

_WORDS = ("failed to map segment", "cannot allocate memory", "can't start new thread", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception comes of too little memory: Python's own, the system's, the loader's or a thread's."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if any(word in str(error).lower() for word in _WORDS):
        return True
    before = error.__cause__ or error.__context__  # libraries raise their own errors of it
    return before is not None and is_out_of_memory(before)
