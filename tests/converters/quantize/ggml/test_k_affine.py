"""Q2_K, Q4_K and Q5_K: ggml reads the blocks as we do, and its own quantizer leaves more error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from converters.quantize.ggml import k_affine
from converters.quantize.rtn_search import LANES
from converters.quantize.tensor import F32, U8
from tests.converters.quantize.ggml.oracle import ggml_dequantize, ggml_quantize, row_nbytes

NAMES = ["q2_k", "q4_k", "q5_k"]
QUANTIZE: dict[str, Callable[[F32, F32 | None], U8]] = {name: getattr(k_affine, f"quantize_{name}") for name in NAMES}
DEQUANTIZE: dict[str, Callable[[U8], F32]] = {name: getattr(k_affine, f"dequantize_{name}") for name in NAMES}
D_AT = {"q2_k": 80, "q4_k": 0, "q5_k": 0}  # d, then dmin

RANDOM = np.random.default_rng(5)
SHAPE = 64, 1024
CASES: dict[str, NDArray[np.floating]] = {
    "normal": RANDOM.normal(0, 0.05, SHAPE),
    "heavy tails": RANDOM.standard_t(2, SHAPE) * 0.02,
    "heavier tails": RANDOM.standard_cauchy(SHAPE) * 0.001,
    "sparse": np.where(RANDOM.random(SHAPE) < 0.02, RANDOM.normal(size=SHAPE), 0),
    "outliers": np.where(RANDOM.random(SHAPE) < 0.001, 100, RANDOM.normal(size=SHAPE)),
    "scales of many sizes": RANDOM.normal(size=SHAPE) * np.repeat(10 ** RANDOM.uniform(-4, 0, (64, 32)), 32, axis=1),
    "all below zero": -RANDOM.random(SHAPE) - 0.5,
    "none above zero": -np.maximum(RANDOM.normal(size=SHAPE), 0),
    "none below zero": np.maximum(RANDOM.normal(size=SHAPE), 0),
    "extremes": RANDOM.choice([-1, 1, 0.5, -0.5, 0], SHAPE),
    "large": RANDOM.normal(0, 10000, SHAPE),
    "d a coarse fp16": RANDOM.normal(0, 1e-4, SHAPE),
    "d the smallest fp16": RANDOM.normal(0, 1e-6, SHAPE),
    "below fp16": RANDOM.normal(0, 1e-9, SHAPE),
    "subnormal": RANDOM.normal(0, 1e-40, SHAPE),
    "zeros": np.zeros(SHAPE),
}
# How much of ggml's error may be left, where it is known to be less.
BOUND = {
    ("q2_k", False): 0.90,
    ("q2_k", True): 0.86,
    ("q4_k", False): 0.97,
    ("q4_k", True): 0.87,
    ("q5_k", False): 0.90,
    ("q5_k", True): 0.78,
}


def weighted_error(name: str, values: F32, stored: F32, importance: F32 | None) -> float:
    """The squared error by ggml's own weights (see k_affine), in float64."""
    exact = values.astype(np.float64)
    if importance is not None:
        squares = np.square(exact).reshape(-1, 256).mean(axis=1) * (1 if name == "q2_k" else 2)
        weight = importance * np.sqrt(np.repeat(squares, 256).reshape(exact.shape) + np.square(exact))
    elif name == "q2_k":
        weight = np.abs(exact)
    else:
        rms = np.sqrt(np.square(exact).reshape(-1, 32).mean(axis=1))
        weight = np.repeat(rms, 32).reshape(exact.shape) + np.abs(exact)
    return float((weight * np.square(exact - stored)).sum())


def importances(width: int) -> dict[str, F32 | None]:
    rng = np.random.default_rng(7)
    return {
        "none": None,
        "uniform": rng.uniform(0.1, 1, width).astype(np.float32),
        "lognormal": np.square(rng.lognormal(0, 1, width)).astype(np.float32),
    }


def compare(name: str, values: F32, importance: F32 | None) -> tuple[float, float]:
    """Our weighted error and ggml's."""
    ours = QUANTIZE[name](values, importance)
    theirs = ggml_quantize(name, values, importance)
    errors = (weighted_error(name, values, ggml_dequantize(name, blocks), importance) for blocks in (ours, theirs))
    return next(errors), next(errors)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_ggmls_bit_for_bit(name: str) -> None:
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (400, row_nbytes(name, 3 * 256)), dtype=np.uint8)  # all codes, scales and minima
    halves = rng.integers(0, 0x7C00, (1200, 2), dtype=np.uint16) | rng.integers(0, 2, (1200, 2), dtype=np.uint16) << 15
    blocks.reshape(1200, -1)[:, D_AT[name] : D_AT[name] + 4] = halves.view(np.uint8)  # every sign, no Inf, no NaN
    assert DEQUANTIZE[name](blocks).tobytes() == ggml_dequantize(name, blocks).tobytes()


def test_a_q4_k_block_worked_by_hand() -> None:
    block = np.zeros(144, np.uint8)
    block[:4] = np.array([0.5, 0.25], "<f2").view(np.uint8)
    block[4:16] = [63, 1, 2, 3 | 2 << 6, 0, 63, 1, 1 << 6, 0, 0, 0, 5 | 6 << 4]  # scale 7: 37, minimum 7: 22
    block[16 + 3] = 9 | 14 << 4  # sub-block 0, value 3 is code 9; sub-block 1, value 3 is code 14
    block[16 + 96 + 31] = 1 << 4  # sub-block 7, value 31
    expected = np.zeros((8, 32), np.float32)
    expected[:] = -0.25 * np.array([0, 63, 1, 0, 0, 0, 0, 22])[:, None]
    expected[0, 3] += 0.5 * 63 * 9
    expected[1, 3] += 0.5 * 1 * 14
    expected[7, 31] += 0.5 * 37 * 1
    np.testing.assert_array_equal(k_affine.dequantize_q4_k(block[None]), expected.reshape(1, 256))


@pytest.mark.parametrize("counts", ["none", "uniform", "lognormal"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_error_is_not_above_ggmls(name: str, case: str, counts: str) -> None:
    ours, theirs = compare(name, CASES[case].astype(np.float32), importances(1024)[counts])
    assert ours <= theirs
    if case == "normal" and counts != "uniform":
        assert ours <= BOUND[name, counts == "lognormal"] * theirs


@pytest.mark.parametrize("value", [0.37, -0.37, 1000.0, -3e-3])
@pytest.mark.parametrize("name", NAMES)
def test_constants_come_back_but_for_the_rounding_of_d(name: str, value: float) -> None:
    values = np.full((3, 512), value, np.float32)
    back = DEQUANTIZE[name](QUANTIZE[name](values, None))
    np.testing.assert_allclose(back, values, rtol=2**-10)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero_beside_other_blocks(name: str) -> None:
    values = np.random.default_rng(2).standard_normal((5, 512)).astype(np.float32)
    values[2], values[4, :256] = 0, 0
    back = DEQUANTIZE[name](QUANTIZE[name](values, None))
    assert not back[2].any() and not back[4, :256].any() and back[3].any()


@pytest.mark.parametrize("name", NAMES)
def test_one_huge_value_comes_back(name: str) -> None:
    values = np.random.default_rng(3).normal(0, 0.01, (1, 256)).astype(np.float32)
    for place, huge in ((0, 30000.0), (77, -30000.0)):
        outlier = values.copy()
        outlier[0, place] = huge
        back = DEQUANTIZE[name](QUANTIZE[name](outlier, None))
        assert back[0, place] == pytest.approx(huge, rel=2**-9)


@pytest.mark.parametrize("magnitude", [1e9, 3.4e38])
@pytest.mark.parametrize("name", NAMES)
def test_values_too_large_for_fp16_factors(name: str, magnitude: float) -> None:
    values = np.random.default_rng(4).uniform(-1, 1, (3, 256)).astype(np.float32)
    values[1, 7] = magnitude
    with pytest.raises(OverflowError, match=rf"{magnitude:.3g}.*{name}".replace("+", r"\+")):
        QUANTIZE[name](values, None)


@pytest.mark.parametrize("width", [256, 768])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_their_neighbours(name: str, counted: bool, width: int) -> None:
    rng = np.random.default_rng(6)
    rows = LANES // 8 + 3
    values = (rng.standard_t(3, (rows, width)) * 10.0 ** rng.integers(-6, 3, (rows, 1))).astype(np.float32)
    importance = importances(width)["lognormal"] if counted else None
    whole = QUANTIZE[name](values, importance)
    assert whole.shape == (rows, row_nbytes(name, width))
    assert np.array_equal(whole, QUANTIZE[name](values, importance)), "twice the same"
    for start, stop in ((0, 1), (1, rows), (4, 5), (rows, rows)):
        assert np.array_equal(QUANTIZE[name](values[start:stop], importance), whole[start:stop])
    strided = np.repeat(values, 2, axis=0)[::2]
    assert np.array_equal(QUANTIZE[name](strided, importance), whole)


@pytest.mark.parametrize("name", NAMES)
def test_importance_moves_the_error_to_columns_that_count_less(name: str) -> None:
    values = np.random.default_rng(8).normal(0, 0.05, (64, 512)).astype(np.float32)
    importance = np.tile(np.array([1, 100], np.float32), 256)
    error = np.square(DEQUANTIZE[name](QUANTIZE[name](values, importance)) - values).mean(axis=0)
    assert error[1::2].mean() < 0.8 * error[::2].mean()
    for factor in (2.0**-100, 2.0**100):
        scaled = (importance * factor).astype(np.float32)
        assert np.array_equal(QUANTIZE[name](values, scaled), QUANTIZE[name](values, importance))


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, (2, 256), elements=st.floats(-1000, 1000, width=32, allow_subnormal=True)),
    st.sampled_from(NAMES),
    st.sampled_from(["none", "lognormal"]),
)
def test_any_values_are_stored_better_than_not_at_all(values: F32, name: str, counts: str) -> None:
    importance = importances(256)[counts]
    blocks = QUANTIZE[name](values, importance)
    back = DEQUANTIZE[name](blocks)
    assert np.array_equal(back, ggml_dequantize(name, blocks))
    assert np.abs(back).max() <= 1.5 * np.abs(values).max() + 2**-23
    nothing = weighted_error(name, values, np.zeros_like(values), importance)
    assert weighted_error(name, values, back, importance) <= nothing * (1 + 1e-6) + 2**-60


@pytest.mark.parametrize("name", NAMES)
def test_a_power_of_two_scales_d_and_dmin_alone(name: str) -> None:
    values = np.random.default_rng(9).normal(0, 1, (9, 512)).astype(np.float32)
    importance = importances(512)["lognormal"]
    back = DEQUANTIZE[name](QUANTIZE[name](values, importance))
    assert np.array_equal(DEQUANTIZE[name](QUANTIZE[name](values * 64, importance)), back * 64)


@pytest.mark.slow
@pytest.mark.parametrize("counts", ["none", "uniform", "lognormal"])
@pytest.mark.parametrize("name", NAMES)
def test_error_on_the_samples_matrices_is_below_ggmls(name: str, counts: str) -> None:
    from converters.checkpoint import open_checkpoint
    from tundish.sample import cached_sample

    checkpoint = open_checkpoint(cached_sample())
    for matrix in ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.qkv_proj", "self_attn.o_proj"):
        for layer in (0, 12, 29):
            tensor = checkpoint[f"model.layers.{layer}.{matrix}.weight"]
            values = tensor.read(0, tensor.shape[0]).astype(np.float32)
            values = values if values.shape[1] % 256 == 0 else values.reshape(-1, 256)
            ours, theirs = compare(name, values, importances(values.shape[1])[counts])
            assert ours < (0.99 if counts != "uniform" else 0.995) * theirs, (matrix, layer)


@pytest.mark.parametrize("share", [0.01, 0.06, 0.25, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_zeros_count_among_a_few_other_values(name: str, share: float) -> None:
    """Even where ggml's weights, without importance, give them none: Q2_K."""
    rng = np.random.default_rng(10)
    for others in (rng.normal(size=SHAPE), rng.choice([-1, 1], SHAPE), np.abs(rng.normal(size=SHAPE))):
        values = np.where(rng.random(SHAPE) < share, others, 0).astype(np.float32)
        ours, theirs = (
            np.square(ggml_dequantize(name, quantize(name, values, None)) - values, dtype=np.float64).sum()
            for quantize in (lambda name, *arguments: QUANTIZE[name](*arguments), ggml_quantize)
        )
        assert ours <= theirs + 1e-6 * np.square(values).sum()


@pytest.mark.parametrize("value", [1.0, -1.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_value_alone_among_zeros(name: str, value: float) -> None:
    values = np.zeros((1, 256), np.float32)
    values[0, 5] = value
    np.testing.assert_allclose(DEQUANTIZE[name](QUANTIZE[name](values, None)), values, atol=1e-3)
