"""A calibration that was killed goes on where it was and comes to the same bytes; what is damaged begins anew."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.quantize.sequential import Progress
from converters.quantize.stream import Store
from tests.tundish.test_calibration_cache import KEYS, ROOT, TEXT, built, contents
from tests.tundish.tiny import write_recipe
from tundish import cache, calibrate, calibration_progress
from tundish.cache import Json, calibration_folders, calibrations, entries, held
from tundish.calibration_progress import Workplace

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL, and no locks")

# Kills itself when a function of a module is called for the n-th time: before it does anything, or after it did.
KILLED = """
import importlib, os, signal, sys
from pathlib import Path
from tundish import calibration_progress
from tundish.job import Choices, build
from tundish.watcher import SILENT
recipe, out, module, name, count, when = sys.argv[1:]
calibration_progress._PATIENCE = 0
owner = importlib.import_module(module)
function, left = getattr(owner, name), [int(count)]
def call(*arguments, **names):
    left[0] -= 1
    if not left[0] and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = function(*arguments, **names)
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, call)
build(Choices(recipe, out=Path(out), verify=False), SILENT)
"""
FIT, SETTLED, INDEX = (
    ("tundish.calibrate", "_fit"),
    ("tundish.calibration_progress", "_settled"),
    ("tundish.calibration_progress", "write_index"),
)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of matrices that are fitted here."""
    names: list[str] = []

    def fit(store: Any, refine: Any, weight: Any, moments: Any) -> Any:
        names.append(weight.name)
        return fitted(store, refine, weight, moments)

    fitted = calibrate._fit
    monkeypatch.setattr(calibrate, "_fit", fit)
    return names


def killed(folder: Path, checkpoint: Path, point: tuple[str, str], count: int, when: str, **changes: Any) -> None:
    """A build that dies at a point."""
    recipe = write_recipe(folder / "killed.yaml", checkpoint, **(KEYS | changes))
    command = [sys.executable, "-c", KILLED, str(recipe), str(folder / "killed"), *point, str(count), when]
    run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


def unfinished() -> Path:
    (folder,) = calibrations().glob("*.unfinished")
    return folder


@pytest.mark.parametrize(
    ("changes", "points"),
    [
        (
            {"method": "gptq"},
            [(SETTLED, 3, "after"), (INDEX, 1, "before"), (INDEX, 1, "after"), (FIT, 6, "after")],
        ),
        (
            {"method": "awq+gptq", "calibration": {"source": "self", "sequences": 2, "length": 32}},
            [(INDEX, 1, "after"), (INDEX, 1, "after"), (FIT, 9, "after")],
        ),
        ({"method": "rtn"}, [(INDEX, 2, "after")]),
    ],
)
def test_killed_again_and_again_it_comes_to_the_same(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    points: list[tuple[tuple[str, str], int, str]],
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TUNDISH_CACHE", str(tmp_path / "elsewhere"))
        built(tmp_path, checkpoint, "expected", **changes)
    for point, count, when in points:
        killed(tmp_path, checkpoint, point, count, when, **changes)
    begun: list[int] = []
    progress = Workplace.progress

    def begin(place: Workplace, store: Store) -> Progress | None:
        found = progress(place, store)
        begun.append(found.index if found else 0)
        return found

    monkeypatch.setattr(Workplace, "progress", begin)
    monkeypatch.setattr(calibrate, "find_scales", lambda *arguments: pytest.fail("they were kept"))
    said = built(tmp_path, checkpoint, "killed", **changes)
    assert begun[0] > 10 and any("goes on" in line for line in said), said
    assert contents(tmp_path / "killed/gguf") == contents(tmp_path / "expected/gguf")
    assert contents(tmp_path / "killed/mlx") == contents(tmp_path / "expected/mlx")
    (made,) = calibrations().iterdir()
    (expected,) = (tmp_path / "elsewhere" / "calibrations").iterdir()
    assert contents(made) == contents(expected)


@pytest.fixture(scope="module")
def origin(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache in which a calibration was killed in the last block, and what it should come to."""
    folder = tmp_path_factory.mktemp("origin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNDISH_CACHE", str(folder / "cache"))
        killed(folder, checkpoint, FIT, 9, "before", method="gptq")
        patch.setenv("TUNDISH_CACHE", str(folder / "elsewhere"))
        built(folder, checkpoint, "expected", method="gptq")
    return folder


@pytest.fixture
def left(origin: Path) -> tuple[Path, Path]:
    """What is left of a calibration that was killed in the last block, and the artifact that it should come to."""
    shutil.copytree(origin / "cache", calibrations().parent, dirs_exist_ok=True)
    return unfinished(), origin / "expected" / "gguf"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_damaged_is_made_anew(
    checkpoint: Path, tmp_path: Path, left: tuple[Path, Path], fits: list[str]
) -> None:
    folder, expected = left
    shutil.copytree(folder, tmp_path / "left")
    cases: list[tuple[str, Callable[[Path], object], bool]] = [
        ("*.quantized0.value", flip, True),
        ("*.floats0.value", lambda path: os.truncate(path, path.stat().st_size - 1), True),
        ("*.importance.npz", Path.unlink, True),
        ("blocks.0.attn_q.codes.npy", flip, True),
        ("index.json", flip, False),
        ("index.json", lambda path: os.truncate(path, path.stat().st_size // 2), False),
        ("index.json", Path.unlink, False),
    ]
    for count, (pattern, damage, named) in enumerate(cases):
        for path in calibrations().iterdir():
            shutil.rmtree(path)
        shutil.copytree(tmp_path / "left", folder)
        (path,) = folder.glob(pattern)
        damage(path)
        fits.clear()
        said = built(tmp_path, checkpoint, f"out{count}", method="gptq")
        assert any(line.startswith("damaged: ") and path.name in line for line in said) == named, said
        assert "blocks.0.attn_q" in fits and contents(tmp_path / f"out{count}/gguf") == contents(expected)
        assert list(calibrations().iterdir()) == calibration_folders()


def test_what_was_not_in_the_index_is_not_used(
    checkpoint: Path, tmp_path: Path, left: tuple[Path, Path], fits: list[str]
) -> None:
    folder, expected = left
    for name in ("blocks.1.mlp_down.codes.npy", "99.quantized0.value", "scales.npz", "index.json.new"):
        (folder / name).write_bytes(b"half of it")
    built(tmp_path, checkpoint, "out", method="gptq")
    assert "blocks.0.attn_q" not in fits and contents(tmp_path / "out/gguf") == contents(expected)


def test_strangers_of_every_kind_are_removed(
    checkpoint: Path, tmp_path: Path, left: tuple[Path, Path], fits: list[str]
) -> None:
    folder, expected = left
    (folder / "stray" / "in").mkdir(parents=True)
    (folder / "importance.npz").mkdir()
    (folder / "index.json.new").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(tmp_path)
    built(tmp_path, checkpoint, "out", method="gptq")
    assert "blocks.0.attn_q" not in fits and contents(tmp_path / "out/gguf") == contents(expected)
    assert tmp_path.is_dir() and list(calibrations().iterdir()) == calibration_folders()


@pytest.mark.parametrize("name", ["index.json", "blocks.0.attn_q.codes.npy"])
@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_in_its_place_is_made_anew(
    checkpoint: Path, tmp_path: Path, left: tuple[Path, Path], fits: list[str], name: str, kind: str
) -> None:
    path, expected = left[0] / name, left[1]
    path.rename(tmp_path / "precious")
    before = (tmp_path / "precious").read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "precious")
    built(tmp_path, checkpoint, "out", method="gptq")
    assert "blocks.0.attn_q" in fits and contents(tmp_path / "out/gguf") == contents(expected)
    assert (tmp_path / "precious").read_bytes() == before and list(calibrations().iterdir()) == calibration_folders()


@pytest.mark.parametrize("dangling", [True, False])
def test_a_link_with_its_name_is_not_used(
    checkpoint: Path, tmp_path: Path, left: tuple[Path, Path], fits: list[str], dangling: bool
) -> None:
    folder, expected = left
    if dangling:
        shutil.rmtree(folder)
    else:
        folder.rename(tmp_path / "precious")
    before = contents(tmp_path / "precious")
    folder.symlink_to(tmp_path / "precious")
    with held(folder) as share:
        assert share is None
    built(tmp_path, checkpoint, "out", method="gptq")
    assert "blocks.0.attn_q" in fits and contents(tmp_path / "out/gguf") == contents(expected)
    assert contents(tmp_path / "precious") == before and not calibration_folders()[0].is_symlink()


def test_a_fresh_build_begins_anew(checkpoint: Path, tmp_path: Path, left: tuple[Path, Path], fits: list[str]) -> None:
    _, expected = left
    said = built(tmp_path, checkpoint, "out", fresh=True, method="gptq")
    assert "blocks.0.attn_q" in fits and not any("goes on" in line for line in said)
    assert contents(tmp_path / "out/gguf") == contents(expected)
    assert list(calibrations().iterdir()) == calibration_folders()


def test_another_key_leaves_it_alone(checkpoint: Path, tmp_path: Path, left: tuple[Path, Path]) -> None:
    folder, _ = left
    before = contents(folder)
    built(tmp_path, checkpoint, "out", method="gptq", calibration=TEXT | {"seed": 5})
    assert contents(folder) == before


def test_who_finds_another_at_it_calibrates_alone(
    checkpoint: Path, tmp_path: Path, left: tuple[Path, Path], fits: list[str]
) -> None:
    folder, expected = left
    before = contents(folder)
    with held(folder) as share:
        assert share is not None
        built(tmp_path, checkpoint, "out", method="gptq")
        assert cache.collect(0, 1e12, lambda text: None)[1][0].kind == "unfinished"
    assert "blocks.0.attn_q" in fits and contents(tmp_path / "out/gguf") == contents(expected)
    assert contents(folder) == before


def test_the_cache_lists_it_and_removes_it_when_it_is_old(left: tuple[Path, Path]) -> None:
    folder, _ = left
    (entry,) = entries()
    assert (entry.kind, entry.method, entry.folder) == ("unfinished", "gptq", folder)
    day = 24 * 60 * 60
    assert cache.collect(30, entry.last_used + 29 * day, lambda text: None) == ([], [])
    assert cache.collect(30, entry.last_used + 30 * day, lambda text: None) == ([entry], [])
    assert not list(calibrations().iterdir())


def test_nothing_is_left_of_one_that_had_found_nothing(left: tuple[Path, Path]) -> None:
    (left[0] / "index.json").unlink()
    cache.reclaim_entries(lambda text: None)
    assert not list(calibrations().iterdir())


def test_a_disk_too_full_for_progress_is_told_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tmp_path, checkpoint, "expected", method="gptq")
    shutil.rmtree(calibrations())
    tried: list[Path] = []

    def fill(path: Path, value: object) -> None:
        tried.append(path)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(calibration_progress, "_save_value", fill)
    monkeypatch.setattr(calibration_progress, "_PATIENCE", 0)
    said = built(tmp_path, checkpoint, "out", method="gptq")
    assert len(tried) == 1 and not tried[0].exists()
    assert len([line for line in said if line.startswith("warning") and "No space left" in line]) == 1
    assert contents(tmp_path / "out/gguf") == contents(tmp_path / "expected/gguf")
    assert list(calibrations().iterdir()) == calibration_folders()


def test_an_interrupted_build_is_gone_on_with(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: list[str]
) -> None:
    def interrupt(*arguments: Any) -> Any:
        if len(fits) == 8:
            raise KeyboardInterrupt
        return counted(*arguments)

    counted = calibrate._fit
    monkeypatch.setattr(calibration_progress, "_PATIENCE", 0)
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "_fit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            built(tmp_path, checkpoint, "out", method="gptq")
    fits.clear()
    built(tmp_path, checkpoint, "out", method="gptq")
    assert fits and "blocks.0.attn_q" not in fits


def test_values_are_kept_wherever_they_lie(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    for room in (0, 1 << 20):
        folder, store = tmp_path / str(room), Store(tmp_path, room)
        folder.mkdir()
        values = {"x/y": store.put(array)}
        importance: Mapping[str, Any] = {"w": array[0, 0]}
        about: Json = {"key": {"method": "rtn"}, "model": "a", "text": "b"}
        Workplace(folder, about).keep_progress(None, Progress(7, values, {}, importance))
        index = cache.read_index(folder)
        assert index is not None
        again = Workplace(folder, about)
        again.take_over(index)
        found = again.progress(store)
        assert found is not None and found.index == 7 and not found.floats
        np.testing.assert_array_equal(found.quantized["x/y"].read(0, 3), array)
        np.testing.assert_array_equal(found.importance["w"], array[0, 0])
