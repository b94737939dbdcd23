"""A manifest is read with suspicion."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.errors import UsageError
from exporters.base import Target
from exporters.registry import EXPORTERS
from tests.tundish.old_build import old_build
from tundish.cards import model_card
from tundish.manifest_file import read_manifest, write_manifest
from tundish.report import write_report
from tundish.tables import summary_text

Edit = Callable[[dict[str, Any]], object]
GATE = {"name": "kl", "passed": True, "figure": 0.01, "threshold": 0.02, "detail": "64 positions"}
FIGURES = {"kl_mean": 0.01, "kl_p99": 1, "top1": 0.9, "perplexity": None, "reference_perplexity": 20.5, "positions": 64}
RESULT = {"passed": True, "versions": {"r": "9"}, "divergence": FIGURES, "answer": "x", "gates": [GATE]}
POINT = {"kl": 0.01, "bits_per_weight": 4.5, "nbytes": {"gguf": 3}, "counts": {"fp32": 1}}
BUDGET = {"budget": "4.5 bits", "chosen": POINT, "front": [POINT], "sensitivity": {"w": 0.01}}


def without(name: str, record: dict[str, Any] = RESULT) -> dict[str, Any]:
    return {part: value for part, value in record.items() if part != name}


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
    "a verdict without its figures": lambda m: m.update(verification={"gguf": without("divergence")}),
    "a gate without a detail": lambda m: m.update(verification={"gguf": RESULT | {"gates": [without("detail", GATE)]}}),
    "a divergence of text": lambda m: m.update(verification={"gguf": RESULT | {"divergence": FIGURES | {"top1": "x"}}}),
    "a licence that is a number": lambda m: m["source"].update(licence=-1),
    "a licence's name that is a list": lambda m: m["source"].update(licence_name=[]),
    "no languages": lambda m: m["source"].pop("languages"),
    "no semantics": lambda m: m["targets"]["gguf"].pop("semantics"),
    "semantics that say nothing": lambda m: m["targets"]["gguf"].update(semantics={}),
    "all bytes as text": lambda m: m["targets"]["gguf"].update(bytes="x"),
    "fewer bytes than none": lambda m: m["targets"]["gguf"].update(bytes=-1),
    "more bytes than any disk": lambda m: m["targets"]["gguf"].update(bytes=10**400),
    "a shape past any": lambda m: m["weights"]["w"].update(shape=[10**400]),
    "a shape of too many axes": lambda m: m["weights"]["w"].update(shape=[1 << 60] * 9),
    "no context": lambda m: m.pop("context_length"),
    "a calibration in parts": lambda m: m.update(calibration={"text": {"a": 1}}),
    "a recipe without a name": lambda m: m["recipe"].pop("name"),
    "a description that is none": lambda m: m["recipe"].update(description=7),
    "no budget": lambda m: m.pop("budget"),
    "a budget without its front": lambda m: m.update(budget={"budget": "4.5", "chosen": POINT}),
    "a budget that chose nothing": lambda m: m.update(budget=BUDGET | {"chosen": None}),
    "a point of no size": lambda m: m.update(budget=BUDGET | {"front": [POINT | {"nbytes": {}}]}),
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


def test_what_edits_start_from_is_taken(tmp_path: Path) -> None:
    """Else they would be refused for another reason."""
    old_build(tmp_path)
    calibration = {"source": "text", "method": "gptq", "text": "built in", "sequences": 8, "chat": False}
    whole = {"verification": {"gguf": RESULT}, "budget": BUDGET, "calibration": calibration}
    write_manifest(tmp_path, read_manifest(tmp_path) | whole)
    manifest = read_manifest(tmp_path)
    assert "| gguf | kl | passed | 0.01 | 0.02 | 64 positions |" in write_report(manifest)
    assert "| kl | passed | 0.01 | 0.02 |" in model_card(manifest, "gguf", EXPORTERS[Target.GGUF].card)
    assert "64 positions" in summary_text(manifest)


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
