"""report.md: every gate with its figure, what was not verified, and no cell that breaks its table."""

from __future__ import annotations

from typing import Any

import numpy as np

from exporters.base import Target
from tundish.divergence import compare_logits
from tundish.gates import failed_gates
from tundish.manifest import verification_record
from tundish.manifest_file import manifest_bytes
from tundish.report import table, write_report
from tundish.results import Gate, TargetResult, measured
from tundish.tables import summary_text


def gate(name: str, passed: bool | None, figure: float | None = None, threshold: float | None = None, detail: str = ""):
    return {"name": name, "passed": passed, "figure": figure, "threshold": threshold, "detail": detail}


def manifest(verification: object) -> dict[str, Any]:
    sentence = {"sentence": "The context is 8 tokens.", "exact_to": 8}
    return {
        "tundish": "1.2.3",
        "source": {"name": "tiny", "repo_id": "owner/tiny", "revision": "abc", "licence": None},
        "recipe": {"name": "a-recipe", "description": "What it is for.\n"},
        "context_length": 8,
        "weights": {
            "a": {"shape": [3, 4], "scheme": "int4_g32"},
            "b": {"shape": [5, 4], "scheme": "int4_g32"},
            "norm": {"shape": [4], "scheme": "fp32"},
        },
        "targets": {name: {"bytes": 2_500_000, "semantics": sentence} for name in ("gguf", "mlx")},
        "verification": verification,
    }


def test_verified() -> None:
    figures = {"kl_mean": 0.125, "kl_p99": 1.5, "top1": 0.75, "perplexity": 20.5, "reference_perplexity": 19.25}
    gates = [gate("kl", False, 0.125, 0.1, "64 positions"), gate("stops", True, detail="3 tokens: 'a|b\nc'")]
    nothing: dict[str, object] = {"passed": None, "divergence": None, "answer": None, "versions": {}}
    report = write_report(
        manifest(
            {
                "gguf": {"passed": False, "divergence": figures, "answer": "x", "versions": {"r": "9"}, "gates": gates},
                "mlx": nothing | {"gates": [gate("runtime", None, detail="mlx not installed")]},
            }
        )
    )
    lines = report.splitlines()
    assert lines[0] == "# a-recipe: tiny"
    assert "Source: owner/tiny at abc, licence not stated. Context: 8 tokens. tundish 1.2.3." in lines
    row = "| gguf | 2.5 MB | FAILED | 0.125000 | 1.5000 | 75.0 % | 20.500 (19.250) | The context is 8 tokens. |"
    assert row in lines
    assert "| mlx | 2.5 MB | not verified | – | – | – | – | The context is 8 tokens. |" in lines
    assert "| gguf | kl | FAILED | 0.125 | 0.1 | 64 positions |" in lines
    assert "| gguf | stops | passed |  |  | 3 tokens: 'a\\|b c' |" in lines
    assert "| mlx | runtime | not verified |  |  | mlx not installed |" in lines
    assert "- gguf: r 9" in lines
    assert "| fp32 | 1 | 4 |" in lines and "| int4_g32 | 2 | 32 |" in lines


def test_figures_that_are_no_numbers() -> None:
    """A gate fails by them, with or without a threshold, and papers say so in valid JSON."""
    logits = np.zeros((1, 4), np.float32)
    divergence = compare_logits([(logits, np.array([[0, 0, 0, -np.inf]], np.float32), np.array([-1]))])
    for threshold in (None, 0.1):
        gate = measured("kl", divergence.kl_mean, threshold, "1 positions")
        result = TargetResult(Target.GGUF, (Gate("runtime", True), gate), {}, divergence)
        assert result.passed is False
        assert failed_gates([result]) == ["gguf kl: 1 positions; its logits give no finite figure"]
        document = manifest(verification_record([result]))
        assert b'"figure": null' in manifest_bytes(document)
        lines = write_report(document).splitlines()
        assert "| gguf | 2.5 MB | FAILED | – | – | 100.0 % | – (–) | The context is 8 tokens. |" in lines
        shown = "" if threshold is None else "0.1"
        assert f"| gguf | kl | FAILED |  | {shown} | 1 positions; its logits give no finite figure |" in lines
        assert "FAILED" in summary_text(document)


def test_not_verified_at_all() -> None:
    report = write_report(manifest(None))
    assert "**Not verified**" in report and "Runtimes:" not in report
    assert report.count("| not verified |") == 2


def test_a_table_has_as_many_cells_in_every_row() -> None:
    lines = table(["a", "b"], [["1", "2"]]).splitlines()
    assert lines == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
