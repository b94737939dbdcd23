"""Paths as users give them."""

from __future__ import annotations

import unicodedata
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


def require_output(path: Path) -> Path:
    """A path that is to be written. UsageError for one with line breaks or control characters, which lists of files,
    logs and runtimes would take for something else; the working directory may have them as well."""
    whole = str(path.absolute())
    odd = sorted({char for char in whole if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")})
    if odd:
        raise UsageError(
            "no path to write to",
            where=repr(whole),
            expected="a path in UTF-8 without line breaks and control characters",
            found=", ".join(f"U+{ord(char):04X}" for char in odd),
            mend="Choose another, or rename the folder that it is in.",
        )
    return path
