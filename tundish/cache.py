"""The user's cache: the sample, and what other builds may want: calibrations, and what matrices cost in fewer bits.

An entry that is kept by content is a folder named by the SHA-256 of its key, with an index that has the key. It gets
its name when it is whole. Whoever reads an entry has a shared lock on its folder, which ends with the process; who
removes it, an exclusive one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import platformdirs

from converters.errors import ModelError
from converters.json_file import read_small
from tundish.disk import cache_errors, replace_file
from tundish.publish import reclaim, staging
from tundish.user_path import expanded

if sys.platform != "win32":
    import fcntl

INDEX = "index.json"
_MAX_INDEX = 1 << 24  # bytes
_KEY = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = ".unfinished"
_LEFT = re.compile(r"\.([0-9a-f]{64}(?:\.unfinished)?)\.[^.]+(?:\.[^.]+)?\.partial")
_SAMPLE = re.compile(r"sample-(smollm2-135m-r\d+)")  # of this version or another: tundish.sample.CACHE_NAME
_DAY = 24 * 60 * 60

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """A folder of the cache. `last_used` is in seconds since 1970."""

    folder: Path
    kind: str
    model: str
    method: str
    text: str
    nbytes: int
    last_used: float

    @property
    def key(self) -> str:
        """What `tundish cache ls` calls it."""
        return self.folder.name[:12]


def cache_folder() -> Path:
    """$TUNDISH_CACHE, or the user's cache as the platform has it."""
    root = os.environ.get("TUNDISH_CACHE")
    return expanded(root).absolute() if root else platformdirs.user_cache_path("tundish")


def calibrations() -> Path:
    """The folder of calibrations, a folder each."""
    return cache_folder() / "calibrations"


def checkpoint_notes() -> Path:
    """The folder of notes where checkpoints lie: tundish.whereabouts."""
    return cache_folder() / "checkpoints"


def costs() -> Path:
    """The folder of what matrices cost in fewer bits, a folder each."""
    return cache_folder() / "costs"


def cache_disk() -> Path | None:
    """The innermost folder of the cache that exists, to ask about its disk; None if the cache cannot be written to."""
    folder = cache_folder()
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK) else None


def canonical(document: Json) -> str:
    """SHA-256, in hex, of a JSON document whose keys may be in any order."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_index(folder: Path, content: Json) -> None:
    """Say what an entry holds. The digest beside it tells when the index itself is damaged."""
    index = {"sha256": canonical(content), "content": content}
    replace_file(folder / INDEX, json.dumps(index, indent=1).encode())


def read_index(folder: Path) -> Json | None:
    """What write_index was given; None if that is not there, or not as it was."""
    try:
        index = json.loads(read_small(folder / INDEX, _MAX_INDEX))
        content: Json = index["content"]
        return content if index["sha256"] == canonical(content) and _is_index(content) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ModelError):
        return None


@contextmanager
def found(
    folder: Path, key: Json, damaged: Callable[[Json], list[str]], say: Callable[[str], None], then: str
) -> Iterator[Json | None]:
    """The index of an entry, which is not removed meanwhile; None if there is none.

    One that has another key, or of whose files `damaged` names some, is none: it is removed, and `say` is told, with
    what is done `then`.
    """
    with in_use(folder) as there:
        index = read_index(folder) if there else None
        wrong = [INDEX] if index is None or index["key"] != key else damaged(index)
        if there and not wrong:
            with suppress(OSError):  # one that may only be read serves as well
                os.utime(folder / INDEX)
            yield index
            return
    if there:
        say(f"damaged: {', '.join(wrong[:5])} in {folder}; {then}")
        if cache_disk() is not None:
            remove(folder)
    yield None


def put(made: Path, folder: Path, fresh: bool) -> bool:
    """Give an entry that is whole its name, in place of one of that name if `fresh`. False if there is one that is as
    good: another was faster, or uses it. OSError if the disk refuses."""
    if fresh:
        remove(folder)
    try:
        made.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True


def unfinished(folder: Path) -> Path:
    """Where the calibration of an entry is made, and goes on if it was killed."""
    return folder.with_name(folder.name + _UNFINISHED)


def _is_index(content: Json) -> bool:
    """Whether it says what is asked of it, each of its kind: a digest that fits makes nothing true."""
    kinds = {"model": str, "text": str, "token_ids_sha256": str, "bits": dict | None, "files": dict}
    return (
        {"model", "text"} <= content.keys()
        and all(isinstance(content[name], kind) for name, kind in kinds.items() if name in content)
        and isinstance(content["key"]["method"], str)
        and all(isinstance(each["bytes"], int) and each["sha256"] for each in content.get("files", {}).values())
    )


def calibration_folders() -> list[Path]:
    """Of the calibrations that are kept, in the order of their names."""
    return _keyed(calibrations())


def _unfinished_folders() -> list[Path]:
    return sorted(
        path
        for path in _in(calibrations())
        if path.name.endswith(_UNFINISHED) and _KEY.fullmatch(path.name.removesuffix(_UNFINISHED)) and path.is_dir()
    )


def entries() -> list[Entry]:
    """All of the cache, the last used first."""
    kinds = {"calibration": calibrations(), "costs": costs()}
    found = [entry for kind, root in kinds.items() for folder in _keyed(root) if (entry := _entry(kind, folder))]
    found += [entry for folder in _unfinished_folders() if (entry := _entry("unfinished", folder))]
    for folder in _in(cache_folder()):
        match = _SAMPLE.fullmatch(folder.name)
        if match and (folder / "config.json").is_file():
            state = (folder / "config.json").stat()
            used = max(state.st_atime, state.st_mtime)  # the files of a checkpoint are only read
            found.append(Entry(folder, "sample", match[1], "", "", _nbytes(folder), used))
    return sorted(found, key=lambda entry: entry.last_used, reverse=True)


def collect(older_than: float, now: float, say: Callable[[str], None]) -> tuple[list[Entry], list[Entry]]:
    """Remove what was last used more than `older_than` days ago, `now` in seconds since 1970, and what builds left
    that were killed. Returns the entries that are gone, and those that stay because something uses them."""
    reclaim_entries(say)
    for note in _in(checkpoint_notes()):
        with suppress(FileNotFoundError):  # another collects at the same time
            if now - note.stat().st_mtime >= older_than * _DAY:
                note.unlink()
    removed: list[Entry] = []
    used: list[Entry] = []
    for entry in entries():
        if now - entry.last_used >= older_than * _DAY:
            (removed if remove(entry.folder) else used).append(entry)
    return removed, used


def reclaim_entries(say: Callable[[str], None]) -> None:
    """Remove what is left of entries whose builds were killed, unless another build can go on with it."""
    for folder in _unfinished_folders():
        if not (folder / INDEX).exists():
            remove(folder)
    for root in (calibrations(), costs()):
        for key in sorted({match[1] for path in _in(root) if (match := _LEFT.fullmatch(path.name))}):
            reclaim(root / key, say)


def remove(folder: Path) -> bool:
    """Remove an entry, at once for whoever looks for it; False if another uses it or has removed it."""
    with in_use(folder, alone=True) as mine:
        if mine:
            with staging(folder, cache_errors) as stage, cache_errors(folder):
                folder.rename(stage / folder.name)
    return mine


@contextmanager
def held(folder: Path) -> Iterator[Callable[[], None] | None]:
    """Have a folder alone; yields what lets others use it as well from then on, but not remove it. None if another
    uses it, it is not there, it is a link, or the system has no such locks."""
    if sys.platform == "win32":
        yield None
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        shared = partial(fcntl.flock, descriptor, fcntl.LOCK_SH)
        yield shared if _locked(descriptor, folder, alone=True) else None
    finally:
        os.close(descriptor)


@contextmanager
def in_use(folder: Path, alone: bool = False) -> Iterator[bool]:
    """Keep a folder from being removed meanwhile, or others from using it. Whether that is so: it is there, and nobody
    had it alone, or at all.

    Where the system has no such locks, it is if the folder is there.
    """
    if sys.platform == "win32":
        yield folder.is_dir()
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        yield _locked(descriptor, folder, alone)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, folder: Path, alone: bool) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), folder.stat())  # it may have been replaced in between
    except OSError:
        return False


def _keyed(root: Path) -> list[Path]:
    return sorted(path for path in _in(root) if _KEY.fullmatch(path.name) and path.is_dir())


def _entry(kind: str, folder: Path) -> Entry | None:
    try:
        path = folder / INDEX
        used = (path if path.exists() else folder).stat().st_mtime
        nbytes = _nbytes(folder)
    except FileNotFoundError:  # removed meanwhile
        return None
    index = read_index(folder)
    if index is None:
        return Entry(folder, kind, "damaged", "", "", nbytes, used)
    return Entry(folder, kind, index["model"], index["key"]["method"], index["text"], nbytes, used)


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _in(folder: Path) -> list[Path]:
    """What a folder holds; nothing if it is not there or cannot be read."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []
