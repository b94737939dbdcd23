"""IQ4_NL and IQ4_XS: ggml reads the blocks as we do, and its own quantizer leaves more error."""

from __future__ import annotations

import numpy as np
import pytest

from converters.quantize.ggml import iq4
from converters.quantize.ggml.symmetric_kernels import CODEBOOK
from tests.converters.quantize.ggml.symmetric_oracle import (
    CASES,
    IMPORTANCES,
    SAMPLE_ROWS,
    Kind,
    ggml_dequantize,
    random_blocks,
    require_no_more_error,
    require_pieces_make_the_same_bytes,
    require_refusal_of_too_large_values,
    sample_matrix,
)

IQ4_NL = Kind("iq4_nl", iq4.quantize_iq4_nl, iq4.dequantize_iq4_nl, d_at=0)
IQ4_XS = Kind("iq4_xs", iq4.quantize_iq4_xs, iq4.dequantize_iq4_xs, d_at=0)
KINDS = pytest.mark.parametrize("kind", [IQ4_NL, IQ4_XS], ids=lambda kind: kind.name)
NUMBERS = np.array(CODEBOOK, np.float32)
# How much of ggml's error may be left on weights such as models have, where it is known to be less.
BOUND = {
    ("iq4_nl", "none"): 0.91,
    ("iq4_nl", "uniform"): 0.99,
    ("iq4_nl", "squares of lognormal"): 0.95,
    ("iq4_xs", "none"): 0.90,
    ("iq4_xs", "uniform"): 0.97,
    ("iq4_xs", "squares of lognormal"): 0.90,
}


@KINDS
def test_any_blocks_have_ggmls_values(kind: Kind) -> None:
    blocks = random_blocks(kind, 40, 10)
    # By bytes, since -0.0 is not 0.0 here.
    assert kind.dequantize(blocks).tobytes() == ggml_dequantize(kind, blocks).tobytes()


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("case", CASES)
@KINDS
def test_the_error_is_no_larger_than_ggmls(kind: Kind, case: str, importance: str) -> None:
    require_no_more_error(kind, CASES[case].astype(np.float32), IMPORTANCES[importance])


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("case", ["normal", "laplace", "heavy tails"])
@KINDS
def test_the_error_is_as_much_smaller_as_it_was(kind: Kind, case: str, importance: str) -> None:
    bound = BOUND[kind.name, importance]
    require_no_more_error(kind, CASES[case].astype(np.float32), IMPORTANCES[importance], bound)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE_ROWS)
@KINDS
def test_the_error_on_a_real_matrix_is_no_larger_than_ggmls(kind: Kind, name: str) -> None:
    values = sample_matrix(name)
    random = np.random.default_rng(1)
    lognormal = random.lognormal(0, 2, (values.shape[1],)).astype(np.float32)
    uniform = random.uniform(0.1, 2, (values.shape[1],)).astype(np.float32)
    for label, importance in (("none", None), ("uniform", uniform), ("squares of lognormal", lognormal)):
        require_no_more_error(kind, values, importance, BOUND[kind.name, label])


@pytest.mark.parametrize("rows", [0, 1, 2, 45])
@KINDS
def test_rows_do_not_depend_on_their_neighbours(kind: Kind, rows: int) -> None:
    require_pieces_make_the_same_bytes(kind, rows)


@pytest.mark.parametrize("size", [1e9, 1e13, 1e30, 3e38])
@KINDS
def test_too_large_values_are_refused(kind: Kind, size: float) -> None:
    values = np.full((3, 512), 0.1, np.float32)
    values[1, 300] = -size
    require_refusal_of_too_large_values(kind, values)


@KINDS
def test_the_largest_values_that_fit(kind: Kind) -> None:
    steps = {"iq4_nl": 127, "iq4_xs": 127 * 32}[kind.name]
    values = np.full((1, 256), 0.7 * 65504 * steps, np.float32)
    values[0, ::3] *= -1
    assert np.allclose(kind.dequantize(kind.quantize(values, None)), values, rtol=0.07)


@KINDS
def test_constants_survive(kind: Kind) -> None:
    values = np.repeat(np.array([[0.3], [-0.3], [1e-3], [-7], [0]], np.float32), 256, axis=1)
    for importance in (None, IMPORTANCES["uniform"]):
        counts = None if importance is None else importance[:256]
        assert np.allclose(kind.dequantize(kind.quantize(values, counts)), values, rtol=2e-2)


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
