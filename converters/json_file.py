"""JSON files of a checkpoint, read with errors a user can mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias

from converters.errors import ModelError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_NBYTES = 100_000_000  # the safetensors format's limit for a header; real config and index files are far smaller


def read_json(path: Path) -> dict[str, Json]:
    """The object in a JSON file. ModelError if the file is missing, unreadable, too large or anything else."""
    try:
        size = path.stat().st_size
        if size > MAX_NBYTES:
            raise ModelError(
                "file is too large", where=path.name, expected=f"at most {MAX_NBYTES} bytes", found=f"{size}"
            )
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(
            "file missing in the checkpoint", where=str(path), mend="Download the checkpoint again."
        ) from error
    except OSError as error:
        raise ModelError("file cannot be read", where=str(path), found=error.strerror or str(error)) from error
    return parse_json(data, path.name)


def parse_json(data: bytes, where: str) -> dict[str, Json]:
    """The object in `data`; ModelError if it is no strict UTF-8 JSON object, nests too deep or repeats a key."""
    try:
        value: Json = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        # The original traceback is a thousand frames that say nothing.
        raise ModelError("JSON is nested too deep", where=where, mend="Download the file again.") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise ModelError("file is no valid JSON", where=where, found=str(error), mend="Download it again.") from error
    if not isinstance(value, dict):
        raise ModelError("file holds no JSON object", where=where, expected="{...}", found=type(value).__name__)
    return value


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} twice in one object")
    return result


def _no_constant(name: str) -> Json:
    raise ValueError(f"the constant {name}")
