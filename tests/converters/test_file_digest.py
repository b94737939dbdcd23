"""Digests through the page cache and past it are hashlib's."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from converters import direct_io
from converters.file_digest import sha256_of

SIZES = [0, 1, 4095, 4096, 4097, direct_io.CHUNK, direct_io.CHUNK + 1, 2 * direct_io.CHUNK + 12345]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{size} bytes" for size in SIZES]
    for path, size in zip(paths, SIZES, strict=True):
        path.write_bytes(rng.bytes(size))
    return paths


@pytest.mark.parametrize("refused", ["nothing", "open", "read", "everywhere"])
def test_digests_are_those_of_the_bytes(files: list[Path], monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    if refused == "open":
        monkeypatch.setattr(direct_io, "open_direct", lambda path, flags: -1)
    elif refused == "read":
        monkeypatch.setattr(os, "preadv", refuse)
    elif refused == "everywhere":
        monkeypatch.setattr(direct_io, "_DIRECT", 0)
    expected = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert sha256_of(files, threads=2) == expected
    assert sha256_of(files[:3], threads=3, written=files[3:]) == expected


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sha256_of([], written=[tmp_path / "gone"])
