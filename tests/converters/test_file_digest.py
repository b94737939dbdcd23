"""Digests are hashlib's, and given up when nobody waits for them."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.errors import ModelError
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


def test_a_body_that_fails_does_not_wait_for_digests(tmp_path: Path) -> None:
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(1 << 42)  # hours of digesting, no byte of disk
    with pytest.raises(KeyboardInterrupt), digesting([tmp_path / "hole"]):
        raise KeyboardInterrupt


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    """Opening a pipe would wait for its writer, and a device may never end."""
    os.mkfifo(tmp_path / "pipe")
    for path in tmp_path / "pipe", Path("/dev/zero"), tmp_path:
        with pytest.raises(ModelError, match="not a file, but a folder, a pipe or a device"):
            sha256_of([path])


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"file cannot be read .*gone.*No such file"):
        sha256_of([tmp_path / "gone"])


def test_a_file_that_may_not_be_read_is_named_before_the_work(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, open_path = files[2], Path.open

    def open_unless_closed(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_path(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_unless_closed)  # root may read everything
    with pytest.raises(ModelError, match=r"file cannot be read .*4096 bytes.*Permission denied"), digesting(files):
        pytest.fail("the body ran")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read")
def test_a_file_that_cannot_be_read_to_its_end_is_named(files: list[Path]) -> None:
    with digesting([*files, Path("/proc/self/mem")]) as digests, pytest.raises(ModelError, match=r"/proc/self/mem"):
        digests.result()
