"""A calibration is done once for each key; what is damaged, half written or of another key is never used."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.errors import ResourceError, UsageError
from converters.quantize.codes import CodeStore
from converters.quantize.sequential import quantize_sequentially
from converters.quantize.tensor import QuantTensor
from exporters.base import Target
from tests.tundish.tiny import INT4, QUIET, write_recipe
from tundish import cache, calibrate, calibration_cache
from tundish.cache import calibration_folders, calibrations, in_use, read_index
from tundish.job import Choices, build, plan_job
from tundish.manifest_file import read_manifest
from tundish.watcher import Watcher

ROOT = Path(__file__).resolve().parents[2]
TEXT: dict[str, Any] = {"source": "text", "text": str(ROOT / "LICENSE"), "sequences": 2, "length": 32}
KEYS: dict[str, Any] = {"schemes": INT4, "method": "awq+gptq", "calibration": TEXT, "targets": {"gguf": {}, "mlx": {}}}


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for every time that a model reads text."""
    told: list[str] = []

    def read(*arguments: Any, **names: Any) -> Any:
        told.append("read")
        return sequentially(*arguments, **names)

    sequentially = quantize_sequentially
    monkeypatch.setattr(calibrate, "quantize_sequentially", read)
    return told


def built(folder: Path, checkpoint: Path, name: str = "out", fresh: bool = False, **changes: Any) -> list[str]:
    """Builds `name`, and returns what was said."""
    recipe = write_recipe(folder / f"{name}.yaml", checkpoint, **(KEYS | changes))
    said: list[str] = []
    build(
        Choices(str(recipe), out=folder / name, verify=False, fresh=fresh),
        Watcher(said.append, lambda *what: None, lambda amount: None),
    )
    return said


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq+gptq", "gptq+signround"])
def test_another_recipe_of_the_model_need_not_calibrate(
    checkpoint: Path, tmp_path: Path, fits: list[str], method: str
) -> None:
    built(tmp_path, checkpoint, "first", method=method)
    assert fits == ["read"]
    said = built(tmp_path, checkpoint, "second", method=method, targets={"gguf": {}, "onnx": {}})
    assert fits == ["read"] and any(line.startswith("calibration: cached") for line in said)
    assert contents(tmp_path / "first" / "gguf") == contents(tmp_path / "second" / "gguf")
    built(tmp_path, checkpoint, "fresh", fresh=True, method=method)
    assert fits == ["read", "read"] and len(calibration_folders()) == 1
    for target in Target.GGUF, Target.MLX:
        assert contents(tmp_path / "first" / target) == contents(tmp_path / "fresh" / target)
    assert [path.name for path in calibrations().iterdir()] == [calibration_folders()[0].name]
    index = read_index(calibration_folders()[0])
    assert index is not None and (index["bits"] is not None) == ("gptq" in method)


def test_best_takes_what_the_method_that_it_settles_to_has_kept(
    checkpoint: Path, tmp_path: Path, fits: list[str]
) -> None:
    built(tmp_path, checkpoint, "first", method="gptq")
    built(tmp_path, checkpoint, "second", method="best")
    assert fits == ["read"]
    first, second = (read_manifest(tmp_path / name) for name in ("first", "second"))
    assert second["calibration"] == first["calibration"] and second["calibration"]["method"] == "gptq"
    assert second["recipe"]["method"] == "best"


def test_what_the_model_wrote_itself_is_not_written_again(
    checkpoint: Path, tmp_path: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"calibration": {"source": "self", "sequences": 2, "length": 32}, "method": "rtn"}
    built(tmp_path, checkpoint, "first", **changes)
    monkeypatch.setattr(calibrate, "calibration_ids", lambda *arguments: pytest.fail("it writes"))
    built(tmp_path, checkpoint, "second", **changes)
    assert fits == ["read"]
    first, second = (read_manifest(tmp_path / name) for name in ("first", "second"))
    assert first["calibration"] == second["calibration"] and first["targets"] == second["targets"]


def test_anything_that_matters_makes_another_key(
    checkpoint: Path, tmp_path: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    weights = next(other.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    built(tmp_path, checkpoint)
    cases: list[dict[str, Any]] = [
        {"calibration": TEXT | {"seed": 1}},
        {"calibration": TEXT | {"length": 33}},
        {"calibration": TEXT | {"chat": True}},
        {"schemes": INT4 | {"overrides": INT4["overrides"] | {"mlp_down": "int8_g32"}}},  # type: ignore[operator]
        {"method": "gptq"},
    ]
    for count, changes in enumerate(cases, 2):
        built(tmp_path, checkpoint, f"out{count}", **changes)
        assert len(fits) == len(calibration_folders()) == count, changes
    built(tmp_path, other, "changed")
    assert len(fits) == 7
    monkeypatch.setattr(calibration_cache, "CALIBRATION_VERSION", 1000)
    built(tmp_path, checkpoint, "newer")
    assert len(fits) == len(calibration_folders()) == 8
    built(tmp_path, checkpoint, "again")
    assert len(fits) == 8


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("blocks.0.attn_q.codes.npy", flip),
        ("blocks.1.mlp_down.scale.npy", Path.unlink),
        ("blocks.1.mlp_down.scale.npy", lambda path: os.truncate(path, path.stat().st_size - 1)),
        ("blocks.0.attn_q.zero.npy", lambda path: path.write_bytes(b"")),
        ("importance.npz", flip),
        ("scales.npz", flip),
        ("index.json", flip),
        ("index.json", Path.unlink),
        ("index.json", lambda path: path.write_text("[" * 100_000)),
    ],
)
def test_damage_is_named_and_made_good(
    checkpoint: Path, tmp_path: Path, fits: list[str], name: str, damage: Callable[[Path], object]
) -> None:
    built(tmp_path, checkpoint)
    (folder,) = calibration_folders()
    damage(folder / name)
    said = built(tmp_path, checkpoint, "second")
    assert len(fits) == 2 and any(line.startswith("damaged: ") and name in line for line in said), said
    assert contents(tmp_path / "out/gguf") == contents(tmp_path / "second/gguf")
    built(tmp_path, checkpoint, "third")
    assert len(fits) == 2, "mended"


def test_two_at_once_both_succeed(checkpoint: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        for running in [pool.submit(built, tmp_path, checkpoint, name, True) for name in ("one", "two")]:
            running.result()
    assert contents(tmp_path / "one" / "gguf") == contents(tmp_path / "two" / "gguf")
    assert list(calibrations().iterdir()) == calibration_folders() and len(calibration_folders()) == 1


def test_an_entry_stays_while_it_is_poured(
    checkpoint: Path, tmp_path: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = CodeStore.rows
    left: list[tuple[int, int]] = []

    def read(store: CodeStore, name: str, start: int, stop: int) -> QuantTensor:
        if not left:  # several threads may come here at once
            removed, used = cache.collect(0, 1e12, lambda text: None)
            left.append((len(removed), len(used)))
        return rows(store, name, start, stop)

    monkeypatch.setattr(CodeStore, "rows", read)
    for name in "made", "found":
        built(tmp_path, checkpoint, name)
        assert set(left) == {(0, 1)}
        left.clear()
    assert len(fits) == 1
    removed, used = cache.collect(0, 1e12, lambda text: None)
    assert (len(removed), used) == (1, []) and list(calibrations().iterdir()) == []


def test_another_that_uses_the_entry_is_not_disturbed_by_a_fresh_build(
    checkpoint: Path, tmp_path: Path, fits: list[str]
) -> None:
    built(tmp_path, checkpoint)
    (folder,) = calibration_folders()
    state = folder.stat()
    with in_use(folder) as mine:
        assert mine
        built(tmp_path, checkpoint, "fresh", fresh=True)
        assert len(fits) == 2 and os.path.samestat(folder.stat(), state)
    assert contents(tmp_path / "out/gguf") == contents(tmp_path / "fresh/gguf")
    assert list(calibrations().iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_to_is_done_without(
    checkpoint: Path, tmp_path: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNDISH_CACHE", str(tmp_path / "file" / "cache"))
    for count, name in enumerate(("one", "two"), 1):
        said = built(tmp_path, checkpoint, name)
        warning = next(line for line in said if line.startswith("warning"))
        assert str(tmp_path / "file" / "cache") in warning and "TUNDISH_CACHE" in warning and len(fits) == count
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_cache_that_can_only_be_read_still_serves(
    checkpoint: Path, tmp_path: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tmp_path, checkpoint)

    def refuse(*arguments: object, **names: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(os.environ["TUNDISH_CACHE"]))
    built(tmp_path, checkpoint, "second")
    assert len(fits) == 1
    flip(calibration_folders()[0] / "importance.npz")
    said = built(tmp_path, checkpoint, "third")
    assert len(fits) == 2 and [line.split(":")[0] for line in said if "anew" in line or "warning" in line] == [
        "damaged",
        "warning",
    ]


def test_a_full_disk_is_told_with_the_mend(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, array: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ResourceError, match=r"cache: No space left.*calibrations.*cache gc.*TUNDISH_CACHE"):
        built(tmp_path, checkpoint)
    assert not (tmp_path / "out").exists()
    (left,) = calibrations().iterdir()
    assert left.name.endswith(".unfinished") and {path.name for path in left.iterdir()} == {"index.json", "scales.npz"}


def test_the_plan_says_what_is_cached(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, **KEYS)
    choices = Choices(str(recipe), out=tmp_path / "out", verify=False)
    with monkeypatch.context() as patch:
        patch.setattr(calibration_cache, "canonical", lambda document: pytest.fail("nothing is there to compare with"))
        _, before = plan_job(choices)
    assert before.time is not None and before.time.calibrate > 0 and before.kept > 0 and "calibration" in before.phases
    build(choices, QUIET)
    _, after = plan_job(choices)
    assert after.cached and after.time is not None and after.time.calibrate == 0 and "calibration" not in after.phases
    assert (after.disk, after.kept, after.scratch) == (before.written, 0, 0)
    assert not plan_job(replace(choices, fresh=True))[1].cached
    write_recipe(recipe, checkpoint, **(KEYS | {"calibration": TEXT | {"seed": 9}}))
    assert not plan_job(choices)[1].cached


def test_a_calibration_computed_elsewhere_is_another(
    checkpoint: Path, tmp_path: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--device cpu has torch compute the calibration; the build passes its gates, the manifest says who computed."""
    answer = {"prompt": "Hello", "max_tokens": 4}
    gates = {"kl": 5, "top1": 0, "stops": False}
    verify = {"text": {"sequences": 1, "length": 64}, "answer": answer, "gates": gates}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, **KEYS, verify=verify)
    built(tmp_path, checkpoint, "numpy")
    manifest = build(Choices(str(recipe), out=tmp_path / "out", device="cpu"), QUIET)
    assert len(fits) == len(calibration_folders()) == 2
    assert read_manifest(tmp_path / "numpy")["computed_by"] == "numpy"
    assert manifest["computed_by"].startswith("torch ") and manifest["computed_by"].endswith(" cpu")
    assert all(entry["passed"] for entry in manifest["verification"].values())
    build(Choices(str(recipe), out=tmp_path / "again", device="cpu", verify=False), QUIET)
    first, second = ((tmp_path / name / "gguf" / "model.gguf").read_bytes() for name in ("out", "again"))
    assert len(fits) == 2 and first == second
    assert plan_job(Choices(str(recipe), device="cpu", verify=False))[1].cached
    with pytest.raises(UsageError, match="torch cannot compute"):
        build(Choices(str(recipe), out=tmp_path / "none", device="meta"), QUIET)
