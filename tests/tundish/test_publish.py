"""A finished folder goes under its final name, and what stood there is never harmed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converters.errors import UsageError
from tundish.publish import publish, require_replaceable, staging


def old_build(out: Path) -> None:
    (out / "gguf").mkdir(parents=True)
    (out / "gguf" / "model.gguf").write_text("old")
    (out / "report.md").write_text("old")
    manifest = {"targets": {"gguf": {"files": {"model.gguf": {"bytes": 3}}}}}
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_replaces_an_earlier_build(tmp_path: Path) -> None:
    out = tmp_path / "a name with späces"
    old_build(out)
    require_replaceable(out)
    with staging(out) as folder:
        (folder / "new").write_text("new")
        publish(folder, out)
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old_build(out)
    with pytest.raises(KeyboardInterrupt), staging(out) as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "gguf" / "model.gguf").read_text() == "old"


def test_a_failed_rename_puts_the_old_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old_build(out)
    with pytest.raises(Exception, match="cannot write"):
        publish(tmp_path / "absent", out)
    assert (out / "gguf" / "model.gguf").read_text() == "old"


@pytest.mark.parametrize("kind", ["foreign folder", "file", "extra file", "foreign manifest"])
def test_refuses_what_it_did_not_write(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        old_build(out)
        if kind == "foreign folder":
            (out / "manifest.json").unlink()
        elif kind == "extra file":
            (out / "gguf" / "notes.txt").write_text("mine")
        else:
            (out / "manifest.json").write_text("[]")
    with pytest.raises(UsageError, match="--out"):
        require_replaceable(out)


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    require_replaceable(out)
    with staging(out) as folder:
        publish(folder, out)
