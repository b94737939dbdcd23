"""Importance matrix files of both generations: against bytes written out by hand, and gguf-py's reader."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from converters.errors import UsageError
from converters.quantize.imatrix import read_imatrix, write_imatrix

MEANS = {
    "blk.1.ffn_down.weight": np.array([0.5, 0.0, 2.0], np.float32),
    "blk.0.attn_q.weight": np.array([1.0, 3.0], np.float32),
}
# The old form, spelled out from save_imatrix and load_imatrix: three calls, so sums are three times the means.
DAT = b"".join(
    [
        struct.pack("<i", 2),
        struct.pack("<i", 19) + b"blk.0.attn_q.weight" + struct.pack("<ii2f", 3, 2, 3.0, 9.0),
        struct.pack("<i", 21) + b"blk.1.ffn_down.weight" + struct.pack("<ii3f", 3, 3, 1.5, 0.0, 6.0),
    ]
)
TAIL = struct.pack("<ii", 3, 8) + b"text.txt"


def require_means(found: object) -> None:
    assert isinstance(found, dict) and found.keys() == MEANS.keys()
    for name, means in MEANS.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], means)


def test_the_old_form(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(DAT + TAIL)
    matrix = read_imatrix(path)
    require_means(matrix.means)
    assert (matrix.chunks, matrix.chunk_size, matrix.datasets) == (3, None, ("text.txt",))
    write_imatrix(path, MEANS, chunks=3, chunk_size=512, datasets=["first.txt", "text.txt"], legacy=True)
    assert path.read_bytes() == DAT + TAIL
    assert [file.name for file in tmp_path.iterdir()] == ["imatrix.dat"]


def test_the_oldest_files_end_after_their_entries(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(DAT)
    matrix = read_imatrix(path)
    require_means(matrix.means)
    assert (matrix.chunks, matrix.datasets) == (0, ())


def test_the_gguf_form(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, MEANS, chunks=2, chunk_size=8, datasets=["a.txt", "b.txt"])
    reader = GGUFReader(path)
    kept = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert kept == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a.txt", "b.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 8,
    }
    shapes = [(tensor.name, tensor.shape.tolist(), tensor.tensor_type.name) for tensor in reader.tensors]
    assert shapes == [  # in ggml's order: the columns first
        ("blk.0.attn_q.weight.in_sum2", [2, 1], "F32"),
        ("blk.0.attn_q.weight.counts", [1, 1], "F32"),
        ("blk.1.ffn_down.weight.in_sum2", [3, 1], "F32"),
        ("blk.1.ffn_down.weight.counts", [1, 1], "F32"),
    ]
    np.testing.assert_array_equal(reader.tensors[0].data.reshape(-1), [16, 48])
    assert reader.tensors[1].data.item() == 16
    matrix = read_imatrix(path)
    require_means(matrix.means)
    assert (matrix.chunks, matrix.chunk_size, matrix.datasets) == (2, 8, ("a.txt", "b.txt"))
    first = path.read_bytes()
    write_imatrix(path, dict(reversed(MEANS.items())), chunks=2, chunk_size=8, datasets=["a.txt", "b.txt"])
    assert path.read_bytes() == first


def write_gguf(path: Path, kind: str, tensors: dict[str, np.ndarray]) -> Path:
    writer = GGUFWriter(path, arch="x")
    writer.add_type(kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_experts_and_what_got_no_input(tmp_path: Path) -> None:
    """As llama-quantize reads them: counts by expert, 1 for one that was never chosen; other tensors do not matter."""
    tensors = {
        "e.weight.in_sum2": np.array([[2, 4], [0, 0]], np.float32),
        "e.weight.counts": np.array([[2], [0]], np.float32),
        "e.weight.in_sum": np.array([[1, 1], [0, 0]], np.float32),
    }
    matrix = read_imatrix(write_gguf(tmp_path / "i.gguf", "imatrix", tensors))
    assert matrix.means.keys() == {"e.weight"}
    np.testing.assert_array_equal(matrix.means["e.weight"], [1, 2, 1, 1])
    assert (matrix.chunks, matrix.chunk_size, matrix.datasets) == (0, None, ())


@pytest.mark.parametrize(
    ("data", "said"),
    {
        "empty": (b"", "ends within an entry"),
        "text": (b"not at all a matrix", "importance matrix"),
        "no entries": (struct.pack("<i", 0), "0 entries"),
        "cut off": (DAT[:-1], "ends within an entry"),
        "cut off in its tail": (DAT + TAIL[:-1], "ends within an entry"),
        "a length beyond the end": (struct.pack("<ii", 1, 2**31 - 1), "ends within an entry"),
        "a negative length": (struct.pack("<ii", 1, -5), "ends within an entry"),
        "no width": (struct.pack("<ii1sii", 1, 1, b"a", 1, 0), "0 values of a"),
        "NaN": (struct.pack("<ii1siif", 1, 1, b"a", 1, 1, np.nan), "NaN or Inf"),
        "negative": (struct.pack("<ii1siif", 1, 1, b"a", 1, 1, -1), "negative numbers"),
        "half a GGUF": (b"GGUF\x03\x00\x00\x00\x01", "damaged"),
    }.values(),
)
def test_what_is_no_matrix_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=said) as caught:
        read_imatrix(path)
    assert str(path) in str(caught.value)


def test_other_gguf_files_are_refused(tmp_path: Path) -> None:
    sums = {"a.in_sum2": np.ones((1, 4), np.float32)}
    with pytest.raises(UsageError, match=r"no importance matrix.*found model"):
        read_imatrix(write_gguf(tmp_path / "model.gguf", "model", sums))
    with pytest.raises(UsageError, match=r"has no a\.counts"):
        read_imatrix(write_gguf(tmp_path / "half.gguf", "imatrix", sums))
    with pytest.raises(UsageError, match="0 entries"):
        read_imatrix(write_gguf(tmp_path / "none.gguf", "imatrix", {"b": np.ones(4, np.float32)}))
    with pytest.raises(UsageError, match="cannot read"):
        read_imatrix(tmp_path / "absent.gguf")


ENTRY = {"a.in_sum2": np.ones((1, 32), np.float32), "a.counts": np.ones((1, 1), np.float32)}


@pytest.mark.parametrize(
    "values",
    {
        "no dimension": np.float32(1),
        "three dimensions": np.ones((1, 1, 32), np.float32),
        "integers": np.ones((1, 32), np.int32),
        "half precision": np.ones((1, 32), np.float16),
    }.values(),
)
@pytest.mark.parametrize("name", ENTRY)
def test_what_llama_imatrix_does_not_write_is_refused(name: str, values: np.ndarray, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "i.gguf", "imatrix", ENTRY | {name: values})
    with pytest.raises(UsageError, match=rf"{name} is \w+ .*, not F32"):
        read_imatrix(path)
