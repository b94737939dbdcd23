"""What is in the cache is listed, and goes when it has not been used for long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tundish.cache import cache_folder, calibrations, collect, entries, in_use, read_index, remove, write_index
from tundish.sample import CACHE_NAME

ROOT = Path(__file__).resolve().parents[2]
DAY = 24 * 60 * 60


def entry(letter: str, days: float) -> Path:
    """One that was last used so many days ago."""
    folder = calibrations() / (letter * 64)
    folder.mkdir(parents=True)
    (folder / "importance.npz").write_bytes(bytes(1000))
    write_index(folder, {"key": {"method": "gptq"}, "model": f"model {letter}", "text": "a.txt"})
    os.utime(folder / "index.json", (0, time.time() - days * DAY))
    return folder


def sample() -> Path:
    folder = cache_folder() / CACHE_NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def tundish(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tundish", "cache", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def test_age_is_since_the_last_use() -> None:
    old, new, kept = entry("a", 31), entry("b", 29), sample()
    (cache_folder() / "mine").mkdir()
    (calibrations() / "mine").mkdir()
    assert [each.folder for each in entries()] == [kept, new, old]
    removed, used = collect(30, time.time(), lambda text: None)
    assert ([each.folder for each in removed], used) == ([old], [])
    assert not old.exists() and new.exists() and kept.exists()
    removed, used = collect(0, time.time() + DAY, lambda text: None)
    assert {each.folder for each in removed} == {new, kept} and used == []
    assert (cache_folder() / "mine").is_dir() and [path.name for path in calibrations().iterdir()] == ["mine"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_what_is_in_use_stays() -> None:
    folder = entry("a", 100)
    with in_use(folder) as one, in_use(folder) as two:
        assert one and two
        removed, used = collect(30, time.time(), lambda text: None)
        assert (removed, [each.folder for each in used]) == ([], [folder]) and folder.exists()
    with in_use(folder, alone=True) as mine:
        assert mine
        with in_use(folder) as other:
            assert not other, "it is being removed"
    assert remove(folder) and not remove(folder)


def test_an_index_that_was_changed_is_none() -> None:
    folder = entry("a", 0)
    assert read_index(folder) == {"key": {"method": "gptq"}, "model": "model a", "text": "a.txt"}
    text = (folder / "index.json").read_text()
    for changed in (text.replace("gptq", "gptp"), text[:-1], "", "7", "[]", "{}", "\xff", "[" * 100_000):
        (folder / "index.json").write_text(changed, encoding="latin-1")
        assert read_index(folder) is None, changed
    assert [each.model for each in entries()] == ["damaged"]


def test_the_commands() -> None:
    assert tundish("ls").stdout.endswith("0 entries, 0 bytes\n") and json.loads(tundish("ls", "--json").stdout) == []
    old, new = entry("a", 31), entry("b", 29)
    rows = json.loads(tundish("ls", "--json").stdout)
    assert [(row["key"], row["kind"], row["model"], row["method"], row["text"]) for row in rows] == [
        ("b" * 12, "calibration", "model b", "gptq", "a.txt"),
        ("a" * 12, "calibration", "model a", "gptq", "a.txt"),
    ]
    size = sum(path.stat().st_size for path in old.iterdir())
    assert rows[1]["bytes"] == size
    assert "model a" in tundish("ls").stdout
    told = tundish("gc").stdout
    assert str(old) in told and f"1 entries removed, {size:,} bytes" in told and not old.exists()
    with in_use(new):
        document = json.loads(tundish("gc", "--all", "--json").stdout)
        assert (document["removed"], document["bytes"]) == ([], 0)
        assert [row["folder"] for row in document["in_use"]] == [str(new)]
    assert json.loads(tundish("gc", "--older-than", "30", "--json").stdout)["removed"] == []
    assert len(json.loads(tundish("gc", "--older-than", "28", "--json").stdout)["removed"]) == 1
    assert tundish("gc", "--older-than", "-1").returncode == 2
