"""Packing into OpenVINO's element types: the oracle is OpenVINO's own conversion of packed constants."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.quantize.tensor import QuantTensor

ov = pytest.importorskip("openvino")

from exporters.openvino import pack  # noqa: E402 - importing needs nothing, but the oracle does


def quantized(bits: int, rows: int, groups: int, group_size: int, seed: int, asymmetric: bool = False) -> QuantTensor:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (rows, groups * group_size), np.uint8)
    scale = rng.normal(size=(rows, groups)).astype(np.float16)
    zero = rng.integers(0, 1 << bits, (rows, groups), np.uint8) if asymmetric else None
    return QuantTensor(codes, scale, zero, bits)


def unpacked(data: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """f32 by OpenVINO."""
    tensor = ov.Tensor(np.ascontiguousarray(data), ov.Shape(shape), getattr(ov.Type, kind))
    return np.asarray(ov.op.Constant(tensor, shared_memory=False).get_data(dtype=np.float32))


def test_first_element_is_in_the_low_nibble():
    tensor = QuantTensor(np.array([[8, 9, 7, 0]], np.uint8), np.ones((1, 1), np.float16), None, 4)
    assert pack.pack_i4(tensor).tolist() == [0x10, 0x8F]  # 0, 1 | -1, -8
    assert pack.pack_u4(tensor).tolist() == [0x98, 0x07]
    wide = QuantTensor(np.array([[128, 129, 127, 0, 255]], np.uint8), np.ones((1, 1), np.float16), None, 8)
    assert pack.pack_i8(wide).tolist() == [0, 1, 255, 128, 127]


CODES = [
    (4, False, "i4", pack.pack_i4),
    (4, True, "u4", pack.pack_u4),
    (8, False, "i8", pack.pack_i8),
    (8, True, "u8", pack.pack_u8),
]


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([32, 64]),
    seed=st.integers(0, 2**32 - 1),
    case=st.sampled_from(CODES),
)
def test_openvino_reads_the_codes(rows, groups, group_size, seed, case):
    bits, asymmetric, kind, packer = case
    tensor = quantized(bits, rows, groups, group_size, seed, asymmetric)
    expected = tensor.codes.astype(np.float32) - (0 if asymmetric else 1 << (bits - 1))
    assert np.array_equal(unpacked(packer(tensor), kind, tensor.codes.shape), expected)


@pytest.mark.parametrize(("groups", "kind", "packer"), [(2, "u4", pack.pack_zero_u4), (3, "u8", pack.pack_zero_u8)])
def test_openvino_reads_zeros_and_scales(groups, kind, packer):
    tensor = quantized(4, 5, groups, 32, 1, asymmetric=True)
    assert np.array_equal(unpacked(packer(tensor), kind, (5, groups)), tensor.zeros())
    assert np.array_equal(unpacked(pack.pack_scale(tensor), "f16", (5, groups)), tensor.scale)


@pytest.mark.parametrize(
    ("kind", "packer", "dtype"),
    [
        ("f32", pack.pack_f32, np.float32),
        ("f16", pack.pack_f16, np.float16),
        ("bf16", pack.pack_bf16, ml_dtypes.bfloat16),
    ],
)
def test_openvino_reads_floats(kind, packer, dtype):
    values = np.random.default_rng(3).normal(size=(3, 7)).astype(dtype)
    assert np.array_equal(unpacked(packer(values), kind, (3, 7)), values.astype(np.float32))


def test_blocks_of_rows_pack_like_the_whole():
    tensor = quantized(4, 6, 4, 32, 9, asymmetric=True)
    for packer in (pack.pack_i4, pack.pack_u4, pack.pack_scale, pack.pack_zero_u4, pack.pack_zero_u8):
        parts = [
            packer(QuantTensor(tensor.codes[r : r + 1], tensor.scale[r : r + 1], tensor.zeros()[r : r + 1], 4))
            for r in range(6)
        ]
        assert np.array_equal(np.concatenate(parts), packer(tensor))
