"""The Prometheus textfile, read back by prometheus_client's own parser."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from converters.errors import ResourceError, UsageError
from tundish.metrics import Run, require_writable, write_metrics

parser = pytest.importorskip("prometheus_client.parser")

KL = {"name": "kl", "passed": True, "figure": 0.25, "threshold": 0.5, "detail": ""}
STOPS = {"name": "stops", "passed": None, "figure": None, "threshold": None, "detail": "not asked"}
MANIFEST: dict[str, Any] = {
    "targets": {"gguf": {"bytes": 1000}, "onnx": {"bytes": 2000}},
    "verification": {"gguf": {"gates": [KL, STOPS]}},
}


def samples(path: Path) -> dict[tuple[str, ...], float]:
    """Value by name and by the values of its labels in the order of their names."""
    families = parser.text_string_to_metric_families(path.read_text())
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def run(status: int = 0, ended: float = 100.0, manifest: dict[str, Any] | None = MANIFEST, recipe: str = "r") -> Run:
    return Run("build", recipe, 'a "model"\\ü', ended, 2.5, status, manifest)


OF = ("build", 'a "model"\\ü', "r")


def test_what_a_build_leaves(tmp_path: Path) -> None:
    path = tmp_path / "t.prom"
    write_metrics(path, [run()])
    assert samples(path) == {
        ("tundish_last_run_timestamp_seconds", *OF): 100,
        ("tundish_last_run_duration_seconds", *OF): 2.5,
        ("tundish_last_run_exit_status", *OF): 0,
        ("tundish_last_success_timestamp_seconds", *OF): 100,
        ("tundish_artifact_bytes", *OF[1:], "gguf"): 1000,
        ("tundish_artifact_bytes", *OF[1:], "onnx"): 2000,
        ("tundish_gate_figure", "kl", *OF[1:], "gguf"): 0.25,
        ("tundish_gate_threshold", "kl", *OF[1:], "gguf"): 0.5,
        ("tundish_gate_passed", "kl", *OF[1:], "gguf"): 1,
    }
    assert [each.name for each in tmp_path.iterdir()] == ["t.prom"], "no temporary file is left"


def test_a_failure_keeps_the_last_success_and_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.prom"
    write_metrics(path, [run()])
    for ended in (200.0, 300.0):
        write_metrics(path, [run(4, ended, None)])
    write_metrics(path, [run(5, 400.0, None), run(recipe="other")])
    found = samples(path)
    assert found["tundish_last_success_timestamp_seconds", *OF] == 100
    assert found["tundish_last_run_timestamp_seconds", *OF] == 400
    assert found["tundish_last_run_exit_status", *OF] == 5
    assert found["tundish_failures_total", *OF, "4"] == 2 and found["tundish_failures_total", *OF, "5"] == 1
    assert found["tundish_artifact_bytes", *OF[1:], "gguf"] == 1000, "what is published is still there"
    assert found["tundish_artifact_bytes", OF[1], "other", "gguf"] == 1000


def test_a_target_that_is_gone_is_told_no_more(tmp_path: Path) -> None:
    path = tmp_path / "t.prom"
    write_metrics(path, [run()])
    write_metrics(path, [run(manifest={"targets": {"onnx": {"bytes": 7}}, "verification": None})])
    assert {key: value for key, value in samples(path).items() if "run" not in key[0] and "last" not in key[0]} == {
        ("tundish_artifact_bytes", *OF[1:], "onnx"): 7
    }


@pytest.mark.parametrize(
    "content", ["tundish_gate_passed{nonsense=\n", 'other{a="b"} 1\n', "# TYPE other gauge\n", "# notes\n"]
)
def test_a_file_of_others_stays(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.prom"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"another file.*expected nothing, or metrics that tundish wrote"):
        require_writable(path)
    with pytest.raises(UsageError, match="another file"):
        write_metrics(path, [run()])
    assert path.read_text() == content


def test_a_file_of_ours_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "t.prom"
    path.write_text('tundish_last_run_exit_status{command="x"} 2\n')
    for status in (0, 4, 0):
        require_writable(path)
        write_metrics(path, [run(status)])
    found = samples(path)
    assert found["tundish_failures_total", *OF, "4"] == 1
    assert not [key for key in found if key[1:] == ("x",)], "labels of another version"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"end in \.prom"):
        require_writable(tmp_path / "t.txt")
    with pytest.raises(UsageError, match="no such folder"):
        require_writable(tmp_path / "absent" / "t.prom")
    with pytest.raises(ResourceError, match=r"cannot write.*Choose another --metrics\."):
        write_metrics(tmp_path / "absent" / "t.prom", [run()])
    (tmp_path / "t.prom").mkdir()
    os.mkfifo(tmp_path / "pipe.prom")
    for name in ("t.prom", "pipe.prom"):
        with pytest.raises(UsageError, match="not a file"):
            require_writable(tmp_path / name)
        with pytest.raises(UsageError, match="not a file"):
            write_metrics(tmp_path / name, [run()])
    (tmp_path / "pipe.prom").unlink()
    assert [each.name for each in tmp_path.iterdir()] == ["t.prom"]
