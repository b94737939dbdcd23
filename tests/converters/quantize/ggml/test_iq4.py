"""IQ4_NL and IQ4_XS: blocks by hand, and what they keep. See test_symmetric for the rest."""

from __future__ import annotations

import numpy as np

from converters.quantize.ggml import iq4
from converters.quantize.ggml.symmetric_kernels import CODEBOOK
from tests.converters.quantize.ggml.symmetric_oracle import IQ4_NL, IQ4_XS

NUMBERS = np.array(CODEBOOK, np.float32)


def test_zeros_are_zeros() -> None:
    values = np.zeros((1, 512), np.float32)
    values[0, :32] = np.arange(32) - 16
    for kind in (IQ4_NL, IQ4_XS):
        back = kind.dequantize(kind.quantize(values, None))
        assert not back[0, 32:].any() and back[0, :12].all()


def test_iq4_nl_block_by_hand() -> None:
    values = (np.concatenate([NUMBERS, NUMBERS[::-1]])[None] / 64).astype(np.float32)
    block = iq4.quantize_iq4_nl(values)
    assert block[0, :2].view("<f2")[0] == 1 / 64
    assert block[0, 2:].tolist() == [j | (15 - j) << 4 for j in range(16)]


def test_iq4_xs_block_by_hand() -> None:
    block = np.zeros((1, 136), np.uint8)
    block[0, :2] = np.array([0.5], "<f2").view(np.uint8)
    block[0, 2:4] = 0b10101010  # all scales 32 - 32
    block[0, 3] ^= 0b11 << 2  # scale 5, values 160 ... 191: upper bits 01
    block[0, 4 + 2] = 7 << 4  # its low bits
    block[0, 8 + 5 * 16 + 1] = 3 | 12 << 4  # values 161 and 177
    values = iq4.dequantize_iq4_xs(block)[0]
    assert values[161] == 0.5 * (7 + 16 - 32) * -65
    assert values[177] == 0.5 * (7 + 16 - 32) * 53
    assert values[160] == 0.5 * (7 + 16 - 32) * -127 and not values[:160].any() and not values[192:].any()


def test_what_a_block_can_hold_is_kept() -> None:
    """Codebook numbers times integer scales, with the largest scale at the range's end: nothing is lost."""
    random = np.random.default_rng(3)
    numbers = NUMBERS[random.integers(0, 16, (8, 32))]
    numbers[:, 0] = -127
    scales = random.integers(8, 32, 8).astype(np.float32)
    scales[5] = -32
    values = (numbers * scales[:, None] * np.float32(2**-12)).reshape(1, 256)
    assert np.array_equal(iq4.dequantize_iq4_xs(iq4.quantize_iq4_xs(values)), values)
    assert np.array_equal(iq4.dequantize_iq4_nl(iq4.quantize_iq4_nl(values)), values)


def test_the_nearest_number_of_the_codebook_is_chosen() -> None:
    """Between -127 and 113, which hold d at 1: every other value gets the number that is nearest to it."""
    between = np.linspace(-126, 112, 30 * 40, dtype=np.float32).reshape(40, 30)
    values = np.concatenate([np.full((40, 1), -127), between, np.full((40, 1), 113)], axis=1).astype(np.float32)
    blocks = iq4.quantize_iq4_nl(values)
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)
    nearest = np.abs(values[:, :, None] - d[:, :, None] * NUMBERS).min(axis=2)
    assert np.allclose(np.abs(iq4.dequantize_iq4_nl(blocks) - values), nearest, atol=1e-4)
