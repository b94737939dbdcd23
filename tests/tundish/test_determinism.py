"""The same checkpoint, recipe and versions give the same bytes, wherever, whenever and with however many threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tundish.tiny import INT4, write_recipe

ROOT = Path(__file__).resolve().parents[2]
OPENBLAS = """
import hashlib
import numpy as np
from tundish.blas import fixed_blas

rng = np.random.default_rng(0)
x = rng.standard_normal((600, 300))
a, b = (rng.standard_normal((rows, 577)).astype(np.float32) for rows in (1000, 333))
with fixed_blas():
    results = np.linalg.cholesky(x.T @ x), a @ b.T, a[:, 5:] @ b[:, 5:].T
print([hashlib.sha256(np.ascontiguousarray(each).data).hexdigest() for each in results])
"""


def run(arguments: list[str], folder: Path, variables: dict[str, str], mask: int, threads: str) -> str:
    """A Python process somewhere else in another world; what it prints."""
    blas = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), threads)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | blas | variables | {"PYTHONPATH": path},
        umask=mask,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def turkish_locale(folder: Path) -> dict[str, str]:
    """Where tr_TR.UTF-8 is, which few machines have: there 0,5 is a half, and I is not i's capital for C's functions.

    Without glibc's sources of locales nothing is there, and it is the C locale.
    """
    if shutil.which("localedef") is None or not Path("/usr/share/i18n/locales/tr_TR").exists():
        return {}
    subprocess.run(["localedef", "-i", "tr_TR", "-f", "UTF-8", str(folder / "tr_TR.UTF-8")], check=True)
    return {"LOCPATH": str(folder)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("verified", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_worlds_build_the_same_bytes(checkpoint: Path, tmp_path: Path, verified: bool) -> None:
    """Calibrated and fitted, in all four containers, with manifest and report."""
    built = []
    turkish = turkish_locale(tmp_path)
    recipe = write_recipe(
        tmp_path / "r.yaml",
        Path("owner/name"),
        schemes=INT4,
        method="awq+gptq",
        calibration={"source": "text", "sequences": 4, "length": 64},
        context=128,
        verify={"text": {"sequences": 1, "length": 64}, "gates": {"kl": 9.0, "stops": False}},
    )
    for threads, zone, locale, mask in (("1", "Asia/Kathmandu", "C", 0o077), ("2", "UTC", "tr_TR.UTF-8", 0o022)):
        world = tmp_path / f"world {threads}"
        moved = world.joinpath(*["deep"] * int(threads), checkpoint.name)
        shutil.copytree(checkpoint, moved)
        for path in moved.iterdir():
            os.utime(path, (10**9 * int(threads), 10**9))
        variables = {"TZ": zone, "LC_ALL": locale, "LANG": locale, "LANGUAGE": locale, "PYTHONHASHSEED": threads}
        variables |= {"TUNDISH_CACHE": str(world / "cache"), "HOME": str(world)} | turkish
        command = ["-m", "tundish", "build", str(recipe), "--model", str(moved), "--out", "out", "--threads", threads]
        run(command + ([] if verified else ["--no-verify"]), world, variables, mask, threads)
        built.append(files_of(world / "out"))
    assert built[0].keys() == built[1].keys() and {"manifest.json", "report.md"} < built[0].keys()
    assert [name for name in built[0] if built[0][name] != built[1][name]] == []


@pytest.mark.skipif(sys.platform == "darwin", reason="Accelerate")
def test_products_do_not_depend_on_the_environment(tmp_path: Path) -> None:
    assert run(["-c", OPENBLAS], tmp_path, {}, 0o022, "1") == run(["-c", OPENBLAS], tmp_path, {}, 0o022, "2")
