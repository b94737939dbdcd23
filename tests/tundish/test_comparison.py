"""Artifacts side by side: real runtimes on a tiny model, and what cannot be compared."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from converters.errors import GateError, UsageError
from exporters.base import Answer, Runtime, Target
from tests.tundish.tiny import INT4, QUIET, write_recipe
from tundish.comparison import Comparison, compare, failure_of, find_artifacts, remarks, table_rows
from tundish.heldout import evaluation_text
from tundish.job import Choices, build
from tundish.manifest_file import PAPERS, read_manifest
from tundish.measure import tokens_per_second
from tundish.papers import write_papers
from tundish.recheck import verify_again
from tundish.whereabouts import remember

NAMES = ["float", "int4"]


@pytest.fixture(scope="module")
def builds(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same model as floats in two containers, and in 4 bits in one."""
    pytest.importorskip("xllamacpp")
    folder = tmp_path_factory.mktemp("builds")
    both = {"gguf": {}, "onnx": {"activations": "fp32"}}
    write_recipe(folder / "float.yaml", checkpoint, targets=both, context=128)
    write_recipe(folder / "int4.yaml", checkpoint, targets={"gguf": {}}, context=128, schemes=INT4)
    for name in NAMES:
        build(Choices(str(folder / f"{name}.yaml"), out=folder / name, verify=False), QUIET)
    return [folder / name for name in NAMES]


@pytest.fixture(autouse=True)
def noted(own_cache: None, builds: Sequence[Path], checkpoint: Path) -> None:
    """Where the checkpoint lies is noted in a cache, and each test has its own."""
    remember(read_manifest(builds[0])["source"]["files"], checkpoint)


def ask(*artifacts: Path, **rest: Any) -> dict[str, Any]:
    return compare(Comparison(artifacts, threads=1, **rest), lambda text: None)


def test_other_text(builds: Sequence[Path], tmp_path: Path) -> None:
    """What a file begins with is read; the same words give the same figures as the held-out text."""
    text = tmp_path / "mine.txt"
    text.write_text(evaluation_text()[0] * 2, encoding="utf-8")
    document = ask(builds[1], text=text)
    assert document["text"] == {"name": "mine.txt", "sequences": 1, "length": 64, "positions": 64}
    assert "64 positions of mine.txt" in remarks(document)[0]
    assert document["artifacts"][0]["kl_mean"] == pytest.approx(ask(builds[1])["artifacts"][0]["kl_mean"], rel=1e-9)
    text.write_text("too little")
    with pytest.raises(UsageError, match=r"too short for the evaluation .*mine\.txt"):
        ask(builds[1], text=text)


def test_figures_are_those_of_a_verification(builds: Sequence[Path], tmp_path: Path) -> None:
    floats, ours = builds
    copy = tmp_path / "int4"
    shutil.copytree(ours, copy)
    document = ask(floats / "gguf", ours)
    assert [row["artifact"] for row in document["artifacts"]] == ["float/gguf", "int4/gguf"]
    assert document["text"] == {"name": "held-out text", "sequences": 1, "length": 64, "positions": 64}
    exact, rounded = document["artifacts"]
    figures = verify_again_figures(copy)
    for name in ("kl_mean", "kl_p99", "top1", "perplexity"):
        assert rounded[name] == pytest.approx(figures[name], rel=1e-9), name
    assert document["reference"]["perplexity"] == pytest.approx(figures["reference_perplexity"], rel=1e-9)
    assert abs(exact["kl_mean"]) < 1e-5 < rounded["kl_mean"] and exact["top1"] == 1
    assert exact["bits_per_weight"] == 32
    assert 4.5 < rounded["bits_per_weight"] < 9, "4.5 and 8.5 bits, and float norms"
    assert rounded["bytes"] == sum(path.stat().st_size for path in (ours / "gguf").iterdir()) > rounded["weight_bytes"]
    assert all(row["tokens_per_second"] is None or row["tokens_per_second"] > 0 for row in document["artifacts"])
    assert not any(row["failed"] or row["note"] for row in document["artifacts"])
    assert failure_of(document) is None


def test_contexts_on_both_sides_of_longropes(builds: Sequence[Path], checkpoint: Path, tmp_path: Path) -> None:
    """Each is held against what its own context means."""
    write_recipe(tmp_path / "long.yaml", checkpoint, targets={"gguf": {}}, context="full")
    build(Choices(str(tmp_path / "long.yaml"), out=tmp_path / "long", verify=False), QUIET)
    rows = ask(builds[0] / "gguf", tmp_path / "long")["artifacts"]
    assert [abs(row["kl_mean"]) < 1e-5 for row in rows] == [True, True]
    assert rows[0]["perplexity"] != pytest.approx(rows[1]["perplexity"], rel=1e-3)


def verify_again_figures(folder: Path) -> dict[str, float]:
    recipe = json.loads((folder / "manifest.json").read_text())
    try:
        manifest = verify_again(folder, None, 1, QUIET)
    except GateError:  # a random model in 4 bits misses the tiny recipe's gates
        manifest = json.loads((folder / "manifest.json").read_text())
    assert recipe["recipe"] == manifest["recipe"]
    figures: dict[str, float] = manifest["verification"]["gguf"]["divergence"]
    return figures


def test_report_and_picture(builds: Sequence[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document = ask(*builds, sequences=2, length=16, out=tmp_path / "deep" / "out")
    assert [row["artifact"] for row in document["artifacts"]] == ["float/gguf", "float/onnx", "int4/gguf"]
    assert {path.name for path in (tmp_path / "deep" / "out").iterdir()} == {"compare.md", "compare.svg"}
    report = (tmp_path / "deep" / "out" / "compare.md").read_text()
    assert "2 sequences of 16 tokens" in report and "![Size against KL](compare.svg)" in report
    header, reference, *rows = table_rows(document)
    assert header[0] == "artifact" and reference[0] == "float32 reference" and len(rows) == 3
    for row in rows:
        assert f"| {' | '.join(row)} |" in report
    drawing = (tmp_path / "deep" / "out" / "compare.svg").read_text()
    assert all(row[0] in drawing for row in rows)
    assert all({path.name for path in folder.iterdir()} <= {*PAPERS, *Target} for folder in builds)


def test_a_runtime_that_fails_and_one_that_is_missing(builds: Sequence[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == "onnxruntime_genai" else find(name)
    )
    monkeypatch.setattr("tundish.comparison._time_limit", lambda artifacts: 0.01)
    document = ask(builds[0], length=8)
    crashed, missing = document["artifacts"]
    assert crashed["failed"] and "time limit" in crashed["note"] and crashed["kl_mean"] is None
    assert not missing["failed"] and "tundish[onnx]" in missing["note"]
    assert document["reference"]["perplexity"] is None
    error = failure_of(document)
    assert error is not None and error.exit_status == 4 and "float/gguf" in str(error) and "onnx" not in str(error)
    assert [row.count("–") for row in table_rows(document)[2:]] == [5, 5]
    assert remarks(document)[-2:] == [f"{row['artifact']}: {row['note']}" for row in document["artifacts"]]


def test_names_tell_builds_apart(builds: Sequence[Path], tmp_path: Path) -> None:
    twin = tmp_path / "int4"
    shutil.copytree(builds[1], twin)
    labels = [artifact.label for artifact in find_artifacts([builds[1], twin, builds[1] / "gguf", builds[0] / "onnx"])]
    assert labels == [f"{builds[1]}/gguf", f"{twin}/gguf", "float/onnx"]


def test_what_cannot_be_compared(builds: Sequence[Path], checkpoint: Path, tmp_path: Path) -> None:
    floats, ours = builds
    with pytest.raises(UsageError, match="not a folder that tundish built"):
        ask(tmp_path)
    with pytest.raises(UsageError, match=r"not an artifact of its build.*expected gguf, onnx"):
        ask(floats / "mlx")
    with pytest.raises(UsageError, match=r"--length.*int4/gguf.*at most 128 tokens; found 129"):
        ask(ours, length=129)
    for out in (ours, ours / "gguf", ours / "new"):
        with pytest.raises(UsageError, match="--out lies in a build"):
            ask(ours, out=out)
    other = tmp_path / "other"
    shutil.copytree(ours, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["source"]["files"]["config.json"] = "0" * 64
    manifest["source"]["name"] = "another"
    write_papers(other, manifest, None)
    with pytest.raises(UsageError, match=r"different checkpoints.*found another, with other contents in config\.json"):
        ask(ours, other)
    with pytest.raises(UsageError, match="not the checkpoint that the artifacts were made from"):
        ask(other, model=str(checkpoint))
    shutil.rmtree(other)
    shutil.copytree(ours, other)
    (other / "gguf" / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(GateError, match=r"files differ from the manifest.*gguf/model\.gguf"):
        ask(ours, other)


class Clockwork:
    """A runtime whose answers take 2 s, and half a second a token; the clock is its own."""

    def __init__(self, stops_after: int) -> None:
        self.now, self.stops_after = 0.0, stops_after

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        count = min(max_tokens, self.stops_after)
        self.now += 2 + 0.5 * count
        return Answer((7,) * count, "", count < max_tokens)


@pytest.mark.parametrize(("stops_after", "speed"), [(100, 2.0), (5, 2.0), (1, None)])
def test_speed_leaves_the_prompt_out(monkeypatch: pytest.MonkeyPatch, stops_after: int, speed: float | None) -> None:
    runtime = Clockwork(stops_after)
    monkeypatch.setattr("tundish.measure.perf_counter", lambda: runtime.now)
    found = tokens_per_second(cast(Runtime, runtime), "prompt", 33)  # which asks for answers alone
    assert found == speed or (found is not None and speed is not None and math.isclose(found, speed))
