"""How what takes long tells what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Watcher:
    """How a job reports what it does: `say` a sentence, `start` a count of a total, `advance` it.

    `published` is called with the build's folder once that has its final name; no signal comes between.
    """

    say: Callable[[str], None]
    start: Callable[[str, int], None]
    advance: Callable[[int], None]
    published: Callable[[Path], None] = lambda out: None


SILENT = Watcher(lambda text: None, lambda text, total: None, lambda amount: None)
