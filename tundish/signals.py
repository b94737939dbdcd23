"""Signals that end a command: they unwind it where it stands, or wait where that would leave things half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def unwind_at_signals() -> None:
    """From now on these signals raise SystemExit, with 128 and their number, in the main thread."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's background jobs want it
            signal.signal(number, _end)


def _end(number: int, frame: object) -> None:
    """Unwind, so that children end and unfinished folders are removed; a second signal must not disturb that."""
    for each in ENDING:
        signal.signal(each, _ignore)  # SIG_IGN would let Python complain of one that came at the same time
    raise SystemExit(128 + number)


def _ignore(number: int, frame: object) -> None:
    pass


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Signals that come meanwhile take effect at the end. Does nothing in a thread, where no handler ever runs.

    Handlers are exchanged: a mask would not do, because the system gives a signal to any thread that takes it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in ENDING}
    waiting = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in waiting:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in waiting.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
