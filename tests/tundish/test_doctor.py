"""What doctor says of a runtime that is missing, one that crashes and one that is well."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from exporters.base import Target
from tundish import doctor
from tundish.child import Ending


def examine(monkeypatch: pytest.MonkeyPatch, failure: str | None, *missing: str) -> dict[str, doctor.Examination]:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find("json"))

    def run_child(module: str, arguments: list[str], log: Path, seconds: float, threads: int) -> Ending:
        assert module == "tundish.doctor"
        if failure is None:
            Path(arguments[1]).write_text(json.dumps([f"a device for {arguments[0]}"]))
        return Ending(failure)

    monkeypatch.setattr(doctor, "run_child", run_child)
    return {row.target: row for row in doctor.examine()}


def test_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = examine(monkeypatch, None)
    assert set(rows) == set(Target)
    for target, row in rows.items():
        assert (row.exports, row.verifies, row.devices, row.mend) == (True, True, [f"a device for {target}"], "")


def test_a_missing_runtime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = examine(monkeypatch, None, "mlx_lm", "openvino")
    mlx, openvino = rows["mlx"], rows["openvino"]
    assert (mlx.exports, mlx.verifies, mlx.mend) == (True, False, "pip install 'tundish[mlx]'"), "writing needs no mlx"
    assert (openvino.exports, openvino.verifies, openvino.devices) == (False, False, [])
    assert rows["gguf"].verifies


def test_a_runtime_that_crashes_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in examine(monkeypatch, "was killed by SIGILL").values():
        assert (row.exports, row.verifies, row.devices) == (True, False, [])
        assert row.mend == "the runtime was killed by SIGILL"
