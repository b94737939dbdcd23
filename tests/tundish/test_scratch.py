"""The folder for what is measured: nobody else's, and gone however its process ends."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from converters.errors import ResourceError
from tundish import publish
from tundish.scratch import temporary_folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_process_left_is_removed_and_a_living_one_keeps_its_own(place: Path) -> None:
    left = place / f".tundish.abcd_123.{publish._machine_of(place)}.partial"
    left.mkdir()
    (left / "logits.npy").touch()
    with temporary_folder() as living:
        assert not left.exists() and living.parent == place and living.stat().st_mode & 0o777 == 0o700
        (living / "logits.npy").touch()
        with temporary_folder() as another:
            assert [path.name for path in living.iterdir()] == ["logits.npy"] and not list(another.iterdir())
    assert not list(place.iterdir())


def test_a_folder_that_cannot_be_made(place: Path) -> None:
    tempfile.tempdir = str(place / ("x" * 300))
    with pytest.raises(ResourceError, match=r"TMPDIR") as raised, temporary_folder():
        pass
    assert "--out" not in str(raised.value)
