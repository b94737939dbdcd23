"""Where this machine's checkpoints lie. Manifests are handed on and do not say; the user's cache does, by content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tundish.cache import canonical, checkpoint_notes
from tundish.disk import cache_errors, replace_file


def remember(files: Mapping[str, str], folder: Path) -> None:
    """Note where a checkpoint lies. `files`: SHA-256 of each, in hex. ResourceError if the cache cannot be written."""
    note = _note(files)
    with cache_errors(note):
        note.parent.mkdir(parents=True, exist_ok=True)
        replace_file(note, json.dumps({"folder": str(folder)}).encode())


def recall(files: Mapping[str, str]) -> Path | None:
    """The folder that was noted for a checkpoint of these files; None if there is no note, or no folder any more."""
    try:
        folder = Path(json.loads(_note(files).read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return folder if folder.is_dir() else None


def _note(files: Mapping[str, str]) -> Path:
    return checkpoint_notes() / f"{canonical(dict(files))}.json"
