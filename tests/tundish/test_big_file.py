"""Writes of any size at any offset, by several threads, past the cache or through it, give the same file."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from converters.direct_io import CHUNK, PAGE
from tundish import big_file
from tundish.big_file import BigFileWriter


def pieces(nbytes: int) -> list[tuple[int, int]]:
    """[start, stop) of uneven pieces: tiny, of whole pages, and larger than a chunk."""
    rng = np.random.default_rng(0)
    cuts = {0, nbytes, PAGE, 17 * PAGE, 17 * PAGE + 1, 3 * CHUNK + 5, *rng.integers(0, nbytes, 40).tolist()}
    ordered = sorted(cuts)
    return list(itertools.pairwise(ordered))


@pytest.mark.parametrize("way", ["direct", "cached", "refused", "short"])
def test_every_byte_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    pwrite, nbytes = os.pwrite, 5 * CHUNK + 123
    data = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
    if way == "cached":
        monkeypatch.setattr(big_file, "open_direct", lambda path, flags: -1)
    file = BigFileWriter(tmp_path / "big", nbytes)
    if way == "refused" or way == "short":

        def other(descriptor: int, part: memoryview, offset: int) -> int:
            if descriptor == file._direct and way == "refused":
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return pwrite(descriptor, part[: 5 * PAGE] if way == "short" else part, offset)

        monkeypatch.setattr(os, "pwrite", other)
    with ThreadPoolExecutor(3) as pool:
        writes = [pool.submit(file.write, data[start:stop].data, start) for start, stop in reversed(pieces(nbytes))]
        for write in writes:
            write.result()
    assert file.sha256() == hashlib.sha256(data.tobytes()).hexdigest()
    file.close()
    assert (tmp_path / "big").read_bytes() == data.tobytes()


@pytest.mark.parametrize("kept", [0, 1000, 1 << 30])
@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_the_digest_is_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int, order: str) -> None:
    """Whatever is written when, and however little may be kept of what came early."""
    monkeypatch.setattr(big_file, "KEPT", kept)
    nbytes = 3 * CHUNK + 77
    data = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
    cuts = pieces(nbytes)
    left = cuts.pop(7)
    data[left[0] : left[1]] = 0
    if order != "forward":
        cuts = cuts[::-1] if order == "backward" else [cuts[k] for k in np.random.default_rng(2).permutation(len(cuts))]
    file = BigFileWriter(tmp_path / "big", nbytes)
    file.leave(left[1] - left[0], left[0])
    for start, stop in cuts:
        file.write(data[start:stop].data, start)
    assert file.sha256() == hashlib.sha256(data.tobytes()).hexdigest()
    assert file._kept == 0
    file.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_taken_away_is_noticed(tmp_path: Path, replaced: bool) -> None:
    file = BigFileWriter(tmp_path / "big", 0)
    (tmp_path / "big").rename(tmp_path / "away")
    if replaced:
        (tmp_path / "big").touch()
    with pytest.raises(FileNotFoundError):
        file.sha256()
    file.close()


def test_a_digest_of_half_a_file_is_refused(tmp_path: Path) -> None:
    file = BigFileWriter(tmp_path / "big", 10)
    file.write(memoryview(b"12345"), 5)
    with pytest.raises(AssertionError):
        file.sha256()
    file.close()


def test_a_full_disk_is_no_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = BigFileWriter(tmp_path / "big", CHUNK)

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        file.write(memoryview(bytes(CHUNK)), 0)
    file.close()


def test_an_existing_file_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        BigFileWriter(tmp_path / "big", PAGE)
    assert (tmp_path / "big").read_bytes() == b"precious"
