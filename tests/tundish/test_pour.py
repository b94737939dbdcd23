"""The pour: places are filled, digests are those of the canonical values, and failures are named."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters.config import ModelConfig, Rope, RopeKind
from converters.errors import ModelError, ResourceError
from converters.graph import Graph, Weight
from converters.quantize.rtn import quantize_rtn
from converters.quantize.scheme import SCHEMES
from converters.quantize.tensor import F32, U8, QuantTensor, Tensor
from converters.role import Role
from exporters.base import BigFile, Layout, Place, Target
from tests.converters.arrays import ArraySource
from tundish import pour as pour_module
from tundish.digest import LEAF_ROWS, digest_of
from tundish.pour import pour, row_blocks

CONFIG = ModelConfig(
    "phi3", 8, 64, 64, 1, 1, 1, 64, 1e-5, Rope(RopeKind.DEFAULT, 1e4, 64), 16, None, True, None, (), None
)


def graph_of(**matrices: F32) -> Graph:
    scheme = SCHEMES["int4_g32"]
    weights = {name: Weight(name, Role.MLP_UP, 0, ArraySource(values), scheme) for name, values in matrices.items()}
    return Graph(CONFIG, (), weights, {})


def codes_of(tensor: Tensor) -> U8:
    assert isinstance(tensor, QuantTensor)
    return tensor.codes


def scales_of(tensor: Tensor) -> U8:
    assert isinstance(tensor, QuantTensor)
    return tensor.scale.view(np.uint8)


def layout_of(graph: Graph) -> Layout:
    """All codes in one file behind a header, all scales in another."""
    places, codes_end, scales_end = {}, 5, 0
    for name, weight in graph.weights.items():
        rows, width = weight.shape
        places[name] = [
            Place("deep/codes", codes_end, width, codes_of),
            Place("scales", scales_end, width // 32 * 2, scales_of, row_multiple=2),
        ]
        codes_end, scales_end = codes_end + rows * width, scales_end + rows * width // 16
    return Layout(
        {"deep/codes": BigFile(codes_end, [(0, b"HEAD!")]), "scales": BigFile(scales_end)}, places, {"a/b.json": b"{}"}
    )


def test_every_byte_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pour_module, "BLOCK_ELEMENTS", 300)  # several blocks a matrix, the last one shorter
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((rows, 64)).astype(np.float32) for rows in (200, 70))
    graph = graph_of(first=first, second=second)
    done: list[int] = []
    poured = pour(graph, {Target.GGUF: layout_of(graph), Target.MLX: layout_of(graph)}, tmp_path, done.append)
    assert sum(done) == first.size + second.size
    expected = [quantize_rtn(values, SCHEMES["int4_g32"]) for values in (first, second)]
    for target in ("gguf", "mlx"):
        assert (tmp_path / target / "deep" / "codes").read_bytes() == b"HEAD!" + b"".join(
            tensor.codes.tobytes() for tensor in expected
        )
        assert (tmp_path / target / "scales").read_bytes() == b"".join(tensor.scale.tobytes() for tensor in expected)
        assert (tmp_path / target / "a" / "b.json").read_bytes() == b"{}"
    assert poured.matrices == {
        name: digest_of(tensor.dequantize()) for name, tensor in zip(("first", "second"), expected, strict=True)
    }
    assert poured.files == {
        target: {
            name: hashlib.sha256((tmp_path / target / name).read_bytes()).hexdigest()
            for name in ("deep/codes", "scales", "a/b.json")
        }
        for target in (Target.GGUF, Target.MLX)
    }


def test_gaps_are_hashed_as_the_zeros_they_are(tmp_path: Path) -> None:
    graph = graph_of(w=np.ones((2, 64), np.float32))
    places = {"w": [Place("f", 7, 64, codes_of)]}
    layout = Layout({"f": BigFile(7 + 128 + 30, [(3, b"HI"), (150, b"!")])}, places, {})
    poured = pour(graph, {Target.GGUF: layout}, tmp_path)
    data = (tmp_path / "gguf" / "f").read_bytes()
    assert data[:7] == b"\0\0\0HI\0\0" and data[135:] == bytes(15) + b"!" + bytes(14)
    assert poured.files[Target.GGUF]["f"] == hashlib.sha256(data).hexdigest()


def test_blocks_respect_the_multiple() -> None:
    weight = graph_of(w=np.zeros((100, 64), np.float32)).weights["w"]
    places = [Place("f", 0, 1, codes_of, 4), Place("f", 0, 1, codes_of, 6)]
    assert list(row_blocks(weight, places)) == [(0, 100)]
    big = replace(weight, source=ArraySource(np.zeros((50_000, 64), np.float32)))
    blocks = list(row_blocks(big, places))
    assert len(blocks) > 2 and blocks[-1][1] == 50_000
    assert all(start % 192 == 0 for start, _ in blocks)  # of 4, 6 and the kernels' 64
    wide = replace(weight, source=ArraySource(np.zeros((128, 1 << 17), np.float32)))
    assert list(row_blocks(wide, places[:1])) == [(0, 64), (64, 128)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(pour_module, "BLOCK_ELEMENTS", 300)
    rng = np.random.default_rng(1)
    graph = graph_of(a=rng.standard_normal((700, 64)).astype(np.float32), b=np.ones((3, 64), np.float32))
    alone = pour(graph, {Target.GGUF: layout_of(graph)}, tmp_path / "one")
    together = pour(graph, {Target.GGUF: layout_of(graph)}, tmp_path / "more", threads=threads)
    assert together == alone
    for name in ("deep/codes", "scales"):
        assert (tmp_path / "one/gguf" / name).read_bytes() == (tmp_path / "more/gguf" / name).read_bytes()


def test_the_first_error_stops_the_pour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pour_module, "BLOCK_ELEMENTS", 300)
    graph = graph_of(w=np.zeros((64 * 200, 64), np.float32))
    written: list[int] = []

    def fills_up(file: int, data: memoryview, offset: int) -> int:
        written.append(offset)
        if len(written) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    monkeypatch.setattr(os, "pwrite", fills_up)
    with pytest.raises(ResourceError, match="No space left"):
        pour(graph, {Target.GGUF: layout_of(graph)}, tmp_path, threads=2)
    assert len(written) < 40, "what was not begun is not done"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_numbers_are_named(tmp_path: Path, bad: float) -> None:
    values = np.zeros((6, 64), np.float32)
    values[4, 7] = bad
    graph = graph_of(good=np.zeros((2, 64), np.float32), spoilt=values)
    with pytest.raises(ModelError, match=r"NaN or Inf \(spoilt in \w*, element \[4, 7\]\)"):
        pour(graph, {Target.GGUF: layout_of(graph)}, tmp_path)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    graph = graph_of(w=np.zeros((2, 64), np.float32))
    with pytest.raises(ResourceError, match=r"cannot write: No space left.*plan") as caught:
        pour(graph, {Target.GGUF: layout_of(graph)}, tmp_path)
    assert caught.value.exit_status == 5


def test_zeros_of_either_sign_have_one_digest() -> None:
    assert digest_of(np.array([[0.0, 1.5]], np.float32)) == digest_of(np.array([[-0.0, 1.5]], np.float32))


def test_a_digest_tells_rows_apart() -> None:
    rows = np.random.default_rng(0).standard_normal((3 * LEAF_ROWS + 5, 8)).astype(np.float32)
    digests = {digest_of(rows)}
    for row in (0, LEAF_ROWS, len(rows) - 1):
        other = rows.copy()
        other[row, 3] = np.nextafter(other[row, 3], np.float32(9))
        digests.add(digest_of(other))
    digests.add(digest_of(np.roll(rows, LEAF_ROWS, axis=0)))
    assert len(digests) == 5
