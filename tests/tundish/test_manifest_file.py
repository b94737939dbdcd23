"""A manifest is read with suspicion."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.errors import UsageError
from tests.tundish.test_publish import old_build
from tundish.manifest_file import read_manifest, write_manifest

Edit = Callable[[dict[str, Any]], object]
EDITS: dict[str, Edit] = {
    "absolute path": lambda m: m["targets"]["gguf"]["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "00"}}),
    "path upwards": lambda m: m["targets"]["gguf"]["files"].update({"a/../../x": {"bytes": 1, "sha256": "00"}}),
    "unknown target": lambda m: m["targets"].update({"../..": m["targets"]["gguf"]}),
    "no targets": lambda m: m["targets"].clear(),
    "no weights": lambda m: m["weights"].clear(),
    "no source files": lambda m: m["source"]["files"].clear(),
    "another format": lambda m: m.update(format=99),
    "no recipe": lambda m: m.pop("recipe"),
    "recipe of another type": lambda m: m.update(recipe=7),
    "a document upwards": lambda m: m["targets"]["gguf"]["documents"].update({"../x": {"bytes": 1, "sha256": "00"}}),
    "no verdict": lambda m: m.pop("verification"),
    "a verdict that is none": lambda m: m.update(verification={"gguf": {"passed": "yes", "versions": {}, "gates": []}}),
    "size as text": lambda m: m["targets"]["gguf"]["files"]["model.gguf"].update(bytes="3"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_an_edited_manifest_is_refused(tmp_path: Path, edit: Edit) -> None:
    old_build(tmp_path)
    manifest = read_manifest(tmp_path)
    edit(manifest)
    write_manifest(tmp_path, manifest)
    with pytest.raises(UsageError, match=r"not a manifest that this tundish wrote"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "7", "[]", "{}", "[" * 100_000, "\udcff", '{"a": "\\ud800"}'])
def test_garbage(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError):
        read_manifest(tmp_path)


def test_numbers_that_are_no_json(tmp_path: Path) -> None:
    old_build(tmp_path)
    manifest, path = read_manifest(tmp_path), tmp_path / "manifest.json"
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_manifest(tmp_path, manifest | {"extra": math.inf})
    assert path.read_text() == before
    for number in ("NaN", "-Infinity", "1e999"):
        path.write_text(before.replace("{", f'{{"extra": {number}, ', 1))
        with pytest.raises(UsageError, match="not a manifest that tundish wrote"):
            read_manifest(tmp_path)


def test_written_whole(tmp_path: Path) -> None:
    old_build(tmp_path)
    manifest = read_manifest(tmp_path) | {"extra": "ü"}
    write_manifest(tmp_path, manifest)
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8")) == manifest
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "report.md", "gguf"}
