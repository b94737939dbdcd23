"""Digests are hashlib's, and given up when nobody waits for them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from converters.file_digest import digesting, sha256_of

SIZES = [0, 1, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (2 << 20) + 12345]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{size} bytes" for size in SIZES]
    for path, size in zip(paths, SIZES, strict=True):
        path.write_bytes(rng.bytes(size))
    return paths


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_digests_are_those_of_the_bytes(files: list[Path], threads: int) -> None:
    assert sha256_of(files, threads) == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_digests_are_taken_while_the_body_runs(files: list[Path]) -> None:
    with digesting(files) as digests:
        contents = {path: path.read_bytes() for path in files}
        assert digests.result() == {path: hashlib.sha256(data).hexdigest() for path, data in contents.items()}


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a file without end")
def test_a_body_that_fails_does_not_wait_for_digests() -> None:
    with pytest.raises(KeyboardInterrupt), digesting([Path("/dev/zero")]):
        raise KeyboardInterrupt


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sha256_of([tmp_path / "gone"])
