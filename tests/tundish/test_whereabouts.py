"""Where checkpoints lie is noted once for all builds of one, also of those that note it at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tundish.cache import checkpoint_notes
from tundish.whereabouts import recall, remember

FILES = {"model.safetensors": "00"}


def test_two_builds_note_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second notes it just before the first gives its note the name."""
    replace = Path.replace

    def slow(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        remember(FILES, tmp_path)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", slow)
    remember(FILES, tmp_path)
    assert recall(FILES) == tmp_path and len(list(checkpoint_notes().iterdir())) == 1
