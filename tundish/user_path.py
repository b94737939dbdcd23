"""Paths as users give them."""

from __future__ import annotations

from pathlib import Path

from converters.errors import UsageError


def expanded(path: Path | str) -> Path:
    """The path with ~ and ~name as home folders; UsageError if there is none of that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            "no such home folder", where=str(path), found=str(error), mend="Write ./ before a name that begins with ~."
        ) from error
