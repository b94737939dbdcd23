"""Half-quadratic quantization against a naive double-precision loop over groups, and what it promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from converters.quantize.hqq import quantize_hqq
from converters.quantize.rtn import quantize_rtn
from converters.quantize.scheme import SCHEMES, Scheme
from converters.quantize.tensor import F32, QuantTensor

F64 = NDArray[np.float64]
INTEGER = [scheme for scheme in SCHEMES.values() if scheme.is_integer]


def heavy(rows: int, width: int, seed: int = 0) -> F32:
    return (np.random.default_rng(seed).standard_t(4, (rows, width)) * 0.02).astype(np.float32)


def importance_like_a_models(width: int) -> F32:
    fourth: F64 = np.random.default_rng(1).standard_normal(width) ** 4
    return (fourth + 0.01).astype(np.float32)


def lp_error(tensor: QuantTensor, weight: F32, importance: F32 | None, norm: float = 0.7) -> F64:
    """f64[out, groups]: the sums that are to fall."""
    off = np.abs(tensor.dequantize().astype(np.float64) - weight) ** norm
    counted = off if importance is None else off * importance
    sums: F64 = counted.reshape(*tensor.scale.shape, -1).sum(axis=2)
    return sums


def leading_bits(value: float) -> float:
    mantissa, exponent = np.frexp(value)
    return float(np.ldexp(np.rint(mantissa * 128) / 128, exponent))


def naive_group(
    w: F64, c: F64, step: float, zero: int, low: int, top: int, symmetric: bool, p: float
) -> tuple[float, int]:
    """The method as its description says, in doubles: shrink the error, fit the grid, while the error falls."""

    def codes(s: float, z: int) -> F64:
        return np.clip(np.rint(w / s) + z, low, top)

    def error(s: float, z: int) -> float:
        return float((c * np.abs(w - s * (codes(s, z) - z)) ** p).sum())

    best, beta = error(step, zero), 10.0
    for _ in range(20):
        q = codes(step, zero)
        e = (w - step * (q - zero)) / step
        size = np.maximum(np.abs(e), 1e-300)
        e = np.sign(e) * np.maximum(size - size ** (p - 1) / beta, 0)
        target = w - step * e
        z = zero if symmetric else int(np.clip(np.rint((c * (q - target / step)).sum() / c.sum()), 0, top))
        u = q - z
        if not (c * u * u).sum():
            break
        s = float((c * target * u).sum() / (c * u * u).sum())
        s = float(np.float16(s)) if symmetric else leading_bits(s)
        reached = error(s, z) if s else np.inf
        if reached >= best:
            break
        step, zero, best, beta = s, z, reached, beta * 1.01
    return step, zero


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["int4_g32", "int8_channel", "int4_asym_g32", "int4_asym_g128"])
def test_equals_the_naive_loop(name: str, weighted: bool) -> None:
    scheme, weight = SCHEMES[name], heavy(24, 256)
    importance = importance_like_a_models(256) if weighted else None
    start, found = quantize_rtn(weight, scheme, importance), quantize_hqq(weight, scheme, importance)
    size, low, top = start.group_size, 1 if scheme.bits == 8 else 0, (1 << scheme.bits) - 1
    counts = (np.ones(256) if importance is None else importance.astype(np.float64)).reshape(-1, size)
    scale, zero = np.empty(start.scale.shape), np.empty(start.scale.shape, np.int64)
    for row, group in np.ndindex(start.scale.shape):
        scale[row, group], zero[row, group] = naive_group(
            weight[row].reshape(-1, size)[group].astype(np.float64),
            counts[group],
            float(start.scale[row, group]),
            int(start.zeros()[row, group]),
            low,
            top,
            scheme.symmetric,
            0.7,
        )
    # A weight between two codes may fall on the other one in single precision, and its group elsewhere.
    same = (found.scale == scale.astype(np.float16)) & (found.zeros() == zero)
    assert same.mean() > 0.97
    assert (start.scale != found.scale).mean() > 0.02, "the naive loop would equal the start"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scheme", INTEGER, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("size", [1, 1e-2, 1e-4, 2e-5], ids=str)
def test_no_group_gets_worse_and_many_better(scheme: Scheme, weighted: bool, size: float) -> None:
    """Also where scales are fp16's subnormal numbers, of which there are few."""
    weight = heavy(64, 512, 2) * np.float32(size)
    importance = importance_like_a_models(512) if weighted else None
    before = lp_error(quantize_rtn(weight, scheme, importance), weight, importance)
    after = lp_error(quantize_hqq(weight, scheme, importance), weight, importance)
    assert (after <= before * 1.00001).all()
    if size == 1:
        assert after.sum() < before.sum() and (after < before * 0.9995).mean() > 0.02


def test_steps_do_not_depend_on_magnitude() -> None:
    """beta counts steps, so a power of two times the weights has the same codes."""
    weight = heavy(16, 128, 3)
    for scheme in INTEGER:
        small, large = quantize_hqq(weight, scheme), quantize_hqq(weight * 64, scheme)
        np.testing.assert_array_equal(small.codes, large.codes)
        np.testing.assert_array_equal(small.scale.astype(np.float32) * 64, large.scale.astype(np.float32))


@pytest.mark.parametrize("scheme", INTEGER, ids=lambda scheme: scheme.name)
def test_blocks_of_rows_do_not_matter(scheme: Scheme) -> None:
    weight, importance = heavy(37, 384, 4), importance_like_a_models(384)
    whole = quantize_hqq(weight, scheme, importance)
    parts = [quantize_hqq(weight[a:b], scheme, importance) for a, b in ((0, 5), (5, 6), (6, 37))]
    np.testing.assert_array_equal(whole.codes, np.concatenate([part.codes for part in parts]))
    np.testing.assert_array_equal(whole.scale, np.concatenate([part.scale for part in parts]))
    np.testing.assert_array_equal(whole.zeros(), np.concatenate([part.zeros() for part in parts]))


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, (2, 128), elements=st.floats(-2e5, 2e5, width=32)), st.sampled_from(INTEGER))
def test_codes_and_scales_are_legal(weight: F32, scheme: Scheme) -> None:
    try:
        tensor = quantize_hqq(weight, scheme)
    except OverflowError:
        assert np.abs(weight).max() > 6e4
        return
    assert np.isfinite(tensor.scale).all()
    assert tensor.codes.min() >= (1 if scheme.symmetric and scheme.bits == 8 else 0)
    assert tensor.codes.max() < 1 << scheme.bits
    if not scheme.symmetric:
        assert (tensor.scale >= 0).all()
        minimum = tensor.scale.astype(np.float32) * tensor.zeros().astype(np.float32)
        np.testing.assert_array_equal(minimum.astype(np.float16).astype(np.float32), minimum)


@pytest.mark.parametrize("scheme", INTEGER, ids=lambda scheme: scheme.name)
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    np.testing.assert_array_equal(quantize_hqq(np.zeros((2, 128), np.float32), scheme).dequantize(), 0)


def test_what_lies_on_the_grid_stays() -> None:
    exact = np.random.default_rng(5).integers(-7, 7, (6, 128)).astype(np.float32)
    exact[:, ::32] = -8
    np.testing.assert_array_equal(quantize_hqq(exact, SCHEMES["int4_g32"]).dequantize(), exact)


def test_scale_beyond_fp16_is_refused() -> None:
    with pytest.raises(OverflowError, match="does not fit fp16"):
        quantize_hqq(np.full((1, 32), 1e30, np.float32), SCHEMES["int4_g32"])
