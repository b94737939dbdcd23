"""JSON files of a checkpoint, read with errors a user can mend."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import TypeAlias

from converters.errors import ModelError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

# Real files have a third of these at most. Together they bound the memory that parsing takes, 1 GiB.
MAX_NBYTES = 64_000_000
MAX_VALUES = 4_000_000


def read_json(path: Path) -> dict[str, Json]:
    """The object in a JSON file. ModelError if the file is missing, unreadable, too large or anything else."""
    try:
        data = read_small(path, MAX_NBYTES)
    except FileNotFoundError as error:
        raise ModelError(
            "file missing in the checkpoint", where=str(path), mend="Download the checkpoint again."
        ) from error
    except OSError as error:
        raise ModelError("file cannot be read", where=str(path), found=error.strerror or str(error)) from error
    return parse_json(data, path.name)


def regular_size(path: Path) -> int:
    """Bytes of a file. OSError if it is missing or something else, such as a pipe, which reading would wait for."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a file, but a folder, a pipe or a device")
    return status.st_size


def read_small(path: Path, most: int) -> bytes:
    """A file's bytes. ModelError if they are more than that many, OSError as regular_size."""
    size = regular_size(path)
    if size > most:
        raise ModelError("file is too large", where=path.name, expected=f"at most {most} bytes", found=f"{size}")
    return path.read_bytes()


def inside(folder: Path, name: str) -> Path:
    """folder/name, if that lies in the folder; links may lead to the blobs of the Hub's cache, where snapshots lie.

    ModelError if it does not: what a checkpoint's files say ends up in artifacts.
    """
    path, root = folder / name, folder.resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle, ValueError: a NUL
        mend = "Download the checkpoint again."
        raise ModelError(
            "impossible name of a checkpoint file", where=repr(name), found=str(error), mend=mend
        ) from error
    roots = [root]
    if root.parent.name == "snapshots":  # models--org--name/snapshots/<commit>/file -> models--org--name/blobs/<hash>
        roots.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(each) for each in roots):
        raise ModelError(
            "checkpoint file lies outside of its folder",
            where=name,
            expected=f"a file in {folder}",
            found=str(target),
            mend="Copy the file into the folder.",
        )
    return path


def parse_json(data: bytes, where: str) -> dict[str, Json]:
    """The object in `data`; ModelError if it is no strict UTF-8 JSON object, nests too deep, repeats a key or
    has half of a surrogate pair."""
    try:
        marks = sum(map(data.count, (b",", b"[", b"{")))  # one before each value
        if marks > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        value: Json = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        if b"\\u" in data:  # an escaped half of a surrogate pair is text that nobody can write
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        # The original traceback is a thousand frames that say nothing.
        raise ModelError("JSON is nested too deep", where=where, mend="Download the file again.") from None
    except ValueError as error:  # UnicodeError and JSONDecodeError among them
        raise ModelError("file is no valid JSON", where=where, found=str(error), mend="Download it again.") from error
    if not isinstance(value, dict):
        raise ModelError("file holds no JSON object", where=where, expected="{...}", found=type(value).__name__)
    return value


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        repeated = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the key {repeated!r} twice in one object")
    return result


def _no_constant(name: str) -> Json:
    raise ValueError(f"the constant {name}")
