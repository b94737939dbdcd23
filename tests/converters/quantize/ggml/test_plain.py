"""The plain types against ggml's own functions: the same bytes without importance, no larger error with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from converters.quantize.ggml import plain
from converters.quantize.ggml.types import GGML_TYPES
from converters.quantize.scheme import SCHEMES, NumberType
from converters.quantize.tensor import F32, U8
from tests.converters.quantize.ggml.oracle import (
    block_values,
    ggml_dequantize,
    ggml_quantize,
    ggml_quantize_reference,
    row_nbytes,
)

NAMES = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
SHAPE = 32, 576
RANDOM = np.random.default_rng(5)

CASES: dict[str, NDArray[np.floating]] = {
    "normal": RANDOM.normal(0, 0.05, (200, 1024)),
    "heavy tails": RANDOM.standard_t(2, (100, 1024)) * 0.02,
    "sparse": np.where(RANDOM.random(SHAPE) < 0.02, RANDOM.normal(size=SHAPE), 0),
    "zeros": np.zeros(SHAPE),
    "negative zeros": -np.zeros(SHAPE),
    "zeros of both signs": np.where(RANDOM.random(SHAPE) < 0.5, 0.0, -0.0),
    "a constant": np.full(SHAPE, 0.3),
    "a negative constant": np.full(SHAPE, -0.3),
    "all above zero": RANDOM.random(SHAPE) + 0.5,
    "all below zero": -RANDOM.random(SHAPE) - 0.5,
    "none below zero": np.maximum(RANDOM.normal(size=SHAPE), 0),
    "none above zero": -np.maximum(RANDOM.normal(size=SHAPE), 0),
    "extremes of both signs": RANDOM.choice([-1.0, 1.0, 0.5, -0.5, 0.0, -0.0], SHAPE),
    "halves": RANDOM.integers(-16, 17, SHAPE) / 2,
    "large": RANDOM.normal(0, 10000, SHAPE),
    "scales below fp16": RANDOM.normal(0, 1e-7, SHAPE),
    "inverses near the end of float32": RANDOM.normal(0, 1e-38, SHAPE),
    "denormals": RANDOM.normal(0, 1e-40, SHAPE),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_ggmls_bit_for_bit_and_so_are_their_values(name: str, case: str) -> None:
    values = CASES[case].astype(np.float32)
    expected = ggml_quantize_reference(name, values)
    assert np.array_equal(GGML_TYPES[name].quantize(values, None), expected)
    # By bytes, since -0.0 is not 0.0 here.
    back = GGML_TYPES[name].dequantize(expected)
    assert back.tobytes() == ggml_dequantize(name, expected).tobytes()


@given(
    arrays(np.float32, (3, 64), elements=st.floats(-60000, 60000, width=32, allow_subnormal=True)),
    st.sampled_from(NAMES),
)
def test_any_blocks_are_ggmls_bit_for_bit(values: F32, name: str) -> None:
    assert np.array_equal(GGML_TYPES[name].quantize(values, None), ggml_quantize_reference(name, values))


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_have_ggmls_values(name: str) -> None:
    blocks = RANDOM.integers(0, 256, (20, row_nbytes(name, 320))).astype(np.uint8)
    scales = blocks.reshape(-1, row_nbytes(name, 32))[:, 1 : 4 if name.endswith("1") else 2 : 2]
    scales &= 0xBF  # no NaN or infinity
    expected = ggml_dequantize(name, blocks)
    assert GGML_TYPES[name].dequantize(blocks).tobytes() == expected.tobytes()


def test_q4_0_block_by_hand() -> None:
    # The extreme value 8 lies at code 0 with d = -1; halves go up: 8.5 - x is cut off.
    values = np.zeros((1, 32), np.float32)
    values[0, :5] = 8, -7, 1, 0.5, -20 / 3
    block = plain.quantize_q4_0(values)
    assert block[0, :2].view("<f2")[0] == -1.0
    assert (block[0, 2:] & 15).tolist() == [0, 15, 7, 8, 15] + [8] * 11
    assert (block[0, 2:] >> 4).tolist() == [8] * 16
    assert plain.dequantize_q4_0(block)[0, :5].tolist() == [8, -7, 1, -0.0, -7]


def test_q5_1_block_by_hand() -> None:
    values = np.arange(32, dtype=np.float32)[None] * 2 + 3
    block = plain.quantize_q5_1(values)
    # d = 2, m = 3, the fifth bits of values 16 ... 31, codes 0 ... 31 with j and j + 16 in one byte.
    assert block.tobytes() == bytes.fromhex("0040 0042 0000ffff") + bytes(j | j << 4 for j in range(16))
    assert np.array_equal(plain.dequantize_q5_1(block), values)


def weighted_error(name: str, blocks: U8, values: F32, importance: F32) -> float:
    """As ggml weighs it: importance * sqrt(row's mean square + value^2)."""
    exact = values.astype(np.float64)
    weight = importance * np.sqrt(np.square(exact).mean(axis=1, keepdims=True) + np.square(exact))
    return float((weight * np.square(GGML_TYPES[name].dequantize(blocks) - exact)).sum())


@pytest.mark.parametrize("case", ["normal", "heavy tails", "sparse", "all above zero", "none below zero"])
@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1"])
def test_with_importance_the_error_is_no_larger_than_ggmls(name: str, case: str) -> None:
    values = CASES[case].astype(np.float32)
    importance = np.random.default_rng(1).lognormal(0, 1.5, size=(values.shape[1],)).astype(np.float32)
    ours = weighted_error(name, GGML_TYPES[name].quantize(values, importance), values, importance)
    theirs = weighted_error(name, ggml_quantize(name, values, importance), values, importance)
    plainly = weighted_error(name, GGML_TYPES[name].quantize(values, None), values, importance)
    assert ours <= theirs
    assert ours < plainly


def test_q8_0_ignores_the_importance() -> None:
    values = CASES["normal"].astype(np.float32)
    importance = np.linspace(0.01, 10, values.shape[1], dtype=np.float32)
    assert np.array_equal(plain.quantize_q8_0(values, importance), plain.quantize_q8_0(values))


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    values = CASES["heavy tails"].astype(np.float32)
    importance = np.linspace(0.01, 10, values.shape[1], dtype=np.float32)
    for counts in (None, importance):
        whole = GGML_TYPES[name].quantize(values, counts)
        cuts = [GGML_TYPES[name].quantize(values[start:stop], counts) for start, stop in [(0, 1), (1, 34), (34, 100)]]
        assert np.array_equal(np.concatenate(cuts), whole)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["zeros", "a constant", "denormals", "scales below fp16", "zeros of both signs"])
def test_blocks_without_a_scale_survive_the_search(name: str, case: str) -> None:
    values = CASES[case].astype(np.float32)
    importance = np.ones(values.shape[1], np.float32)
    back = GGML_TYPES[name].dequantize(GGML_TYPES[name].quantize(values, importance))
    assert np.isfinite(back).all()
    assert np.abs(back - values).max() <= max(np.abs(values).max() * 2**-6, 2**-20)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_what_fp16_cannot_scale_is_an_overflow(name: str, weighted: bool) -> None:
    values = np.ones((2, 64), np.float32)
    values[1, 5] = -3e38
    values[1, 6] = 3e38
    with pytest.raises(OverflowError, match="does not fit fp16"):
        GGML_TYPES[name].quantize(values, np.ones(64, np.float32) if weighted else None)


def test_the_table_has_every_type_in_gguf_pys_sizes() -> None:
    schemes = {name: scheme for name, scheme in SCHEMES.items() if scheme.type is NumberType.GGML}
    assert GGML_TYPES.keys() == schemes.keys()
    for name, kind in GGML_TYPES.items():
        assert schemes[name].group_size == block_values(name)
        blocks = kind.quantize(np.ones((2, 512), np.float32), None)
        assert blocks.shape == (2, row_nbytes(name, 512)) and kind.dequantize(blocks).shape == (2, 512)
