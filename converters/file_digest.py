"""Digests of files, several at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from converters.direct_io import sha256_past_cache


def sha256_of(paths: Iterable[Path], threads: int = 1, written: Iterable[Path] = ()) -> dict[Path, str]:
    """SHA-256 of each file, in hex. `written` are more files, which were written past the page cache.

    The largest come first, so that no thread is left with one of them at the end.
    """
    work = dict.fromkeys(paths, _sha256) | dict.fromkeys(written, sha256_past_cache)
    ordered = sorted(work, key=lambda path: path.stat().st_size, reverse=True)
    with ThreadPoolExecutor(threads, thread_name_prefix="digest") as pool:
        return dict(zip(ordered, pool.map(lambda path: work[path](path), ordered), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
