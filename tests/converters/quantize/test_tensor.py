"""The canonical quantized tensor."""

from __future__ import annotations

import numpy as np

from converters.quantize.tensor import QuantTensor


def test_dequantize_by_hand() -> None:
    codes = np.array([[0, 8, 15, 7]], np.uint8)
    scale = np.array([[0.5, -2.0]], np.float16)
    symmetric = QuantTensor(codes, scale, None, 4)
    np.testing.assert_array_equal(symmetric.dequantize(), [[-4, 0, -14, 2]])
    asymmetric = QuantTensor(codes, scale, np.array([[1, 15]], np.uint8), 4)
    np.testing.assert_array_equal(asymmetric.dequantize(), [[-0.5, 3.5, 0, 16]])
    assert QuantTensor(codes, scale, None, 8).zeros().tolist() == [[128, 128]]


def test_regroup_keeps_the_numbers() -> None:
    rng = np.random.default_rng(0)
    tensor = QuantTensor(
        rng.integers(0, 16, (3, 128)).astype(np.uint8),
        rng.standard_normal((3, 1)).astype(np.float16),
        rng.integers(0, 16, (3, 1)).astype(np.uint8),
        4,
    )
    smaller = tensor.regroup(32)
    assert smaller.group_size == 32 and smaller.scale.shape == (3, 4)
    np.testing.assert_array_equal(smaller.dequantize(), tensor.dequantize())
