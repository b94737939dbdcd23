"""The packers against a naive one, and against mlx's own idea of the layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.errors import ModelError
from converters.quantize.tensor import QuantTensor
from exporters.mlx.pack import group_size_for, pack_biases, pack_codes, pack_scales


def test_a_row_by_hand() -> None:
    codes = np.array([[0, 1, 2, 3, 4, 5, 6, 7] + [15] * 24], np.uint8)
    tensor = QuantTensor(codes, np.array([[0.5]], np.float16), None, 4)
    words = pack_codes(tensor).view("<u4")
    assert [f"{word:08x}" for word in words] == ["76543210", "ffffffff", "ffffffff", "ffffffff"]
    assert pack_scales(tensor, 32, "F16").view("<f2").tolist() == [0.5]
    assert pack_biases(tensor, 32, "F16").view("<f2").tolist() == [-4.0]


@st.composite
def tensors(draw: st.DrawFn) -> QuantTensor:
    bits = draw(st.sampled_from((4, 8)))
    group = draw(st.sampled_from((32, 64, 128)))
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    codes = random.integers(0, 1 << bits, (rows, groups * group)).astype(np.uint8)
    # Scales of 7 significant bits of either sign: scale * zero is then exact in fp16, as the quantizer promises.
    scale = random.integers(-127, 128, (rows, groups)) * 2.0 ** random.integers(-12, -4, (rows, groups))
    zero = random.integers(0, 16, (rows, groups)).astype(np.uint8) if draw(st.booleans()) and bits == 4 else None
    return QuantTensor(codes, scale.astype(np.float16), zero, bits)


@given(tensors())
def test_codes_as_a_naive_packer_writes_them(tensor: QuantTensor) -> None:
    rows, width = tensor.shape
    per_word = 32 // tensor.bits
    expected = np.zeros((rows, width // per_word), "<u4")
    for row in range(rows):
        for column in range(width):
            expected[row, column // per_word] |= int(tensor.codes[row, column]) << tensor.bits * (column % per_word)
    assert np.array_equal(pack_codes(tensor), expected.reshape(-1).view(np.uint8))


@given(tensors(), st.sampled_from(("F16", "F32")), st.sampled_from((32, 64, 128)))
def test_mlx_dequantizes_what_was_packed(tensor: QuantTensor, dtype: str, group: int) -> None:
    mx = pytest.importorskip("mlx.core")
    if tensor.group_size % group:
        return
    rows, width = tensor.shape
    floats = {"F16": "<f2", "F32": "<f4"}[dtype]
    words = mx.array(pack_codes(tensor).view("<u4").reshape(rows, -1))
    scales = mx.array(pack_scales(tensor, group, dtype).view(floats).reshape(rows, width // group)).astype(mx.float32)
    biases = mx.array(pack_biases(tensor, group, dtype).view(floats).reshape(rows, width // group)).astype(mx.float32)
    found = np.array(mx.dequantize(words, scales, biases, group, tensor.bits))
    assert np.array_equal(found, tensor.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_packs_the_same_words(bits: int) -> None:
    mx = pytest.importorskip("mlx.core")
    weight = mx.random.normal((6, 128), key=mx.random.key(0))
    words, scales, biases = mx.quantize(weight, 32, bits)
    exact = (np.array(weight).reshape(6, 4, 32) - np.array(biases)[:, :, None]) / np.array(scales)[:, :, None]
    codes = np.rint(exact).clip(0, 2**bits - 1).astype(np.uint8).reshape(6, 128)
    tensor = QuantTensor(codes, np.ones((6, 4), np.float16), None, bits)
    assert np.array_equal(pack_codes(tensor).view("<u4").reshape(6, -1), np.array(words))


def test_a_bias_that_fp16_cannot_hold_is_an_error() -> None:
    tensor = QuantTensor(np.zeros((1, 32), np.uint8), np.array([[600.0]], np.float16), None, 8)
    with pytest.raises(ModelError, match="activations to fp32"):
        pack_biases(tensor, 32, "F16")
    assert pack_biases(tensor, 32, "F32").view("<f4").tolist() == [-76800.0]


def test_group_sizes_that_mlx_has() -> None:
    assert [group_size_for(size, 768) for size in (32, 64, 128, 0)] == [32, 64, 128, 128]
    assert [group_size_for(0, row) for row in (576, 96, 48)] == [64, 32, None]
