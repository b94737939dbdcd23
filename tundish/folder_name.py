"""Names that become folders of results: of recipes, and of a matrix's models."""

from __future__ import annotations

import unicodedata

from converters.errors import UsageError

MAX_BYTES = 255  # of a name, in the file systems that matter
EXPECTED = f"the name of a folder: up to {MAX_BYTES} bytes, no / or \\, no control characters, no dot first"


def is_folder_name(name: str) -> bool:
    """Whether a folder may be called so: a name that is shown, is a place of its own and has no parts."""
    try:
        nbytes = len(name.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return (
        bool(name.strip())
        and nbytes <= MAX_BYTES
        and not name.startswith(".")
        and not any(sign in "/\\" or unicodedata.category(sign) == "Cc" for sign in name)
    )


def require_folder_name(name: str, file: str) -> str:
    """The name, which `file` has given to the folder of its results. UsageError if no folder may be called so."""
    if not is_folder_name(name):
        mend = "Rename the file, or choose --out."
        raise UsageError(
            "the file's name names no folder", where=repr(file), expected=EXPECTED, found=repr(name), mend=mend
        )
    return name


def folded(name: str) -> str:
    """Equal for names that some file systems take for one: case and composition of letters do not count there."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()
