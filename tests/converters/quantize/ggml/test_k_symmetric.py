"""Q3_K and Q6_K: blocks by hand, and what they keep. See test_symmetric for the rest."""

from __future__ import annotations

import numpy as np
import pytest

from converters.quantize.ggml import k_symmetric
from converters.quantize.tensor import F32
from tests.converters.quantize.ggml.symmetric_oracle import Q3_K, Q6_K, Kind

KINDS = pytest.mark.parametrize("kind", [Q3_K, Q6_K], ids=lambda kind: kind.name)


@KINDS
def test_an_outlier_costs_its_own_sub_block_only(kind: Kind) -> None:
    values = np.random.default_rng(0).normal(0, 0.02, (1, 256)).astype(np.float32)
    values[0, 40] = 0.4
    back = kind.dequantize(kind.quantize(values, None))
    error = np.abs(back - values)
    rest = np.r_[0:32, 48:256]
    assert error[0, 40] < 0.02 and error[0, rest].max() < (0.03 if kind is Q3_K else 0.004)


def test_zeros_are_zeros() -> None:
    assert not k_symmetric.quantize_q6_k(np.zeros((1, 256), np.float32))[0, 192:].any()  # scales and d
    assert not k_symmetric.quantize_q3_k(np.zeros((1, 256), np.float32))[0, 108:].any()
    half = np.zeros((1, 512), np.float32)
    half[0, :16] = np.arange(16)
    for kind in (Q3_K, Q6_K):
        back = kind.dequantize(kind.quantize(half, None))
        assert not back[0, 16:].any() and back[0, 2:16].all()


def test_q6_k_block_by_hand() -> None:
    block = np.zeros((1, 210), np.uint8)
    block[0, 208:] = np.array([0.5], "<f2").view(np.uint8)
    block[0, 192 + 7] = 256 - 3  # values 112 ... 127
    block[0, 192 + 8] = 5  # values 128 ... 143
    block[0, 32 + 16] = 9 << 4  # value 112: the low bits of 96 + 16
    block[0, 128 + 16] = 2 << 6
    block[0, 64 + 1] = 15  # value 129
    block[0, 128 + 32 + 1] = 3
    values = k_symmetric.dequantize_q6_k(block)[0]
    assert values[112] == 0.5 * -3 * (9 + 2 * 16 - 32)
    assert values[129] == 0.5 * 5 * (15 + 3 * 16 - 32)
    assert values[113] == 0.5 * -3 * -32 and not values[:112].any()


def test_q3_k_block_by_hand() -> None:
    block = np.zeros((1, 110), np.uint8)
    block[0, 108:] = np.array([0.25], "<f2").view(np.uint8)
    block[0, 96:104], block[0, 104:108] = 0, 0b10101010  # all scales 32 - 32
    block[0, 96 + 1] |= 5 << 4  # scale 9: values 144 ... 159
    block[0, 104 + 1] ^= 0b11 << 4  # its upper bits 01 instead of 10
    block[0, 32 + 32 + 16] = 2  # value 144 is number 16 of the second half
    block[0, 16] = 1 << 4  # its third bit
    values = k_symmetric.dequantize_q3_k(block)[0]
    assert values[144] == 0.25 * (5 + 16 - 32) * (2 + 4 - 4)
    assert values[145] == 0.25 * (5 + 16 - 32) * -4
    assert not values[:144].any() and not values[160:].any()


def _spread(codes: int, scales: F32) -> F32:
    """f32[1, 256]: in each sub-block of 16 codes from -codes/2 on, times a scale of its own."""
    numbers = np.arange(256).reshape(16, 16) * 7 % codes - codes // 2
    numbers[:, 0] = -codes // 2
    return (numbers * scales[:, None]).astype(np.float32).reshape(1, 256)


def test_what_a_block_can_hold_is_kept() -> None:
    """Integer codes times integer scales, with the largest scale at the range's end: nothing is lost."""
    random = np.random.default_rng(3)
    six = random.integers(60, 128, 16).astype(np.float32)
    six[5] = -128
    values = _spread(64, six * np.float32(2**-13))
    assert np.array_equal(k_symmetric.dequantize_q6_k(k_symmetric.quantize_q6_k(values)), values)
    three = random.integers(8, 32, 16).astype(np.float32)
    three[5] = -32
    values = _spread(8, three * np.float32(2**-10))
    assert np.array_equal(k_symmetric.dequantize_q3_k(k_symmetric.quantize_q3_k(values)), values)
