"""The digests by which the Hub's cache calls its files, and what of them can be compared at once."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from converters.errors import ModelError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SMALL = 1 << 26  # bytes: what git itself holds is at most some megabytes


def announced_digests(folder: Path) -> dict[str, str]:
    """SHA-256 in hex of a snapshot's large files, by name, as their blobs are called; to be compared where all is read.

    Those that git holds have its SHA-1 for a name, and are compared here. ModelError names one that differs.
    """
    digests = {}
    for path in sorted(folder.iterdir()):
        if not path.is_symlink():
            continue
        name = path.readlink().name  # of the blob, which may be a link too: to one that repositories share
        if _SHA256.fullmatch(name):
            digests[path.name] = name
        elif _SHA1.fullmatch(name) and path.stat().st_size <= _SMALL:
            _require_git(path, name)
    return digests


def _require_git(path: Path, expected: str) -> None:
    data = path.read_bytes()
    found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ModelError(
            "a file is not what the Hub announced",
            where=str(path),
            expected=f"git's SHA-1 {expected}",
            found=found,
            mend="It is damaged, or was changed: remove it, and what it is a link to, and download again.",
        )
