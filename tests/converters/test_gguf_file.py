"""GGUF files that are odd or hostile; sound ones are read wherever artifacts are."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from converters.gguf_file import GgufFile, read_gguf

Entry = tuple[str, tuple[int, ...], GGMLQuantizationType, int]
F32, Q8_1, I32 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_1, GGMLQuantizationType.I32


def opened(path: Path, entries: list[Entry], data: bytes = bytes(256)) -> GgufFile:
    """A file of tensors: name, sizes with the innermost first, type and offset of each."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(entries), 0)
    for name, sizes, kind, offset in entries:
        header += struct.pack("<Q", len(name)) + name.encode()
        header += struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return read_gguf(path)


def test_values(tmp_path: Path) -> None:
    numbers = np.arange(8, dtype=np.float32)
    file = opened(tmp_path / "a", [("matrix", (4, 2), F32, 0)], numbers.tobytes())
    np.testing.assert_array_equal(file.values("matrix"), numbers.reshape(2, 4))
    file = opened(tmp_path / "b", [("number", (), F32, 12), ("none", (4, 0), F32, 0)], numbers.tobytes())
    assert file.values("number").shape == () and file.values("number") == 3
    assert file.values("none").shape == (0, 4)


@pytest.mark.parametrize("kind", [Q8_1, I32])
def test_types_without_numbers_are_refused_when_they_are_read(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    file = opened(tmp_path / "a", [("a", (32,), kind, 0)])
    assert file.tensors["a"].type is kind
    with pytest.raises(ValueError, match=f"tensor a of type {kind.name}"):
        file.values("a")


def test_a_block_is_not_cut(tmp_path: Path) -> None:
    for sizes in ((), (16,)):
        with pytest.raises(ValueError, match="in blocks of 32"):
            opened(tmp_path / "a", [("a", sizes, Q8_1, 0)])


@pytest.mark.parametrize("offset", [0, 64, 124])
def test_tensors_that_share_bytes_are_refused(offset: int, tmp_path: Path) -> None:
    """Three hundred over one region of a megabyte would be three hundred megabytes of numbers."""
    with pytest.raises(ValueError, match="overlaps one that ends at"):
        opened(tmp_path / "a", [("a", (32,), F32, 0), ("b", (8, 2), F32, offset)])


def test_tensors_may_lie_apart_in_any_order(tmp_path: Path) -> None:
    entries: list[Entry] = [("a", (8,), F32, 128), ("b", (32,), F32, 0), ("none", (0,), F32, 64)]
    assert opened(tmp_path / "a", entries).tensors.keys() == {"a", "b", "none"}
