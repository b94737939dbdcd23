"""The round-to-nearest quantizer: against a naive search, by hand, and by property."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from converters.quantize.rtn import quantize_rtn
from converters.quantize.scheme import SCHEMES, Scheme
from converters.quantize.tensor import F32

INTEGER = [scheme for scheme in SCHEMES.values() if scheme.is_integer]


def squared_error(weight: F32, scheme: Scheme) -> float:
    return float(np.square(quantize_rtn(weight, scheme).dequantize() - weight, dtype=np.float64).sum())


def absmax_error(weight: F32, scheme: Scheme) -> float:
    """What plain rounding leaves, with the scale from the extreme value alone (symmetric) or the range (asymmetric)."""
    groups = weight.reshape(-1, scheme.group_size_for(weight.shape[1])).astype(np.float64)
    top = (1 << scheme.bits) - 1
    if scheme.symmetric:
        extreme = groups[np.arange(len(groups)), np.abs(groups).argmax(axis=1)]
        scale = extreme / (-8 if scheme.bits == 4 else 127)
        zero = np.full(len(groups), 1 << (scheme.bits - 1))
    else:
        low, high = np.minimum(groups.min(axis=1), 0), np.maximum(groups.max(axis=1), 0)
        scale = (high - low) / top
        zero = np.rint(-low / scale)
    scale = scale.astype(np.float16).astype(np.float64)
    codes = np.clip(np.rint(groups / scale[:, None]) + zero[:, None], 0, top)
    return float(np.square((codes - zero[:, None]) * scale[:, None] - groups).sum())


def exhaustive_error(group: F32) -> float:
    """The least squared error of symmetric int4 codes for one group, over a very fine grid of scales of both signs."""
    extreme = np.abs(group).max()
    magnitudes = np.linspace(extreme / 16, extreme / 5, 4000)
    scales = np.concatenate([magnitudes, -magnitudes])
    codes = np.clip(np.rint(group[None, :] / scales[:, None]), -8, 7)
    return float(np.square(codes * scales[:, None] - group).sum(axis=1).min())


@pytest.mark.parametrize("scheme", INTEGER, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one-sided", "constant"])
def test_beats_plain_rounding(scheme: Scheme, kind: str) -> None:
    rng = np.random.default_rng(3)
    weight = {
        "normal": rng.standard_normal((24, 256)),
        "heavy tails": rng.standard_t(2, (24, 256)),
        "one-sided": rng.uniform(0.5, 1.0, (24, 256)),
        "constant": np.full((24, 256), 0.37),
    }[kind].astype(np.float32)
    bound = absmax_error(weight, scheme)
    if kind == "constant":
        bound += weight.size * (0.37 * 2**-8) ** 2  # one value: all that is left is the rounding of the scale
    assert squared_error(weight, scheme) <= bound * (1 + 1e-6)


def test_close_to_the_best_scale_there_is() -> None:
    groups = np.random.default_rng(4).standard_normal((64, 32)).astype(np.float32)
    best = sum(exhaustive_error(group) for group in groups)
    assert squared_error(groups, SCHEMES["int4_g32"]) <= 1.02 * best
    assert absmax_error(groups, SCHEMES["int4_g32"]) > 1.08 * best, "the comparison must be able to fail"


def test_values_on_the_grid_come_back_exactly() -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 16, (8, 64))
    codes[:, ::32] = 0  # every group reaches the end of the range, so that the grid is determined
    scale = np.repeat(rng.uniform(0.01, 0.1, (8, 2)).astype(np.float16).astype(np.float32), 32, axis=1)
    weight = (codes - 8) * scale
    tensor = quantize_rtn(weight.astype(np.float32), SCHEMES["int4_g32"])
    np.testing.assert_array_equal(tensor.dequantize(), weight)


@pytest.mark.parametrize("scheme", INTEGER, ids=lambda scheme: scheme.name)
def test_blocks_and_threads_do_not_matter(scheme: Scheme) -> None:
    weight = np.random.default_rng(6).standard_normal((37, 384)).astype(np.float32)
    whole = quantize_rtn(weight, scheme)
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        parts = [quantize_rtn(weight[start:stop], scheme) for start, stop in ((0, 5), (5, 6), (6, 37))]
    finally:
        numba.set_num_threads(threads)
    np.testing.assert_array_equal(whole.codes, np.concatenate([part.codes for part in parts]))
    np.testing.assert_array_equal(whole.scale, np.concatenate([part.scale for part in parts]))
    if whole.zero is not None:
        zeros = [part.zero for part in parts if part.zero is not None]
        np.testing.assert_array_equal(whole.zero, np.concatenate(zeros))


# Down to where an fp16 scale is still normal, up to where it still is finite.
values = st.floats(-3e4, 3e4, width=32, allow_subnormal=False)


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, (2, 128), elements=values), st.sampled_from(INTEGER))
def test_every_value_is_within_half_a_step_or_clipped(weight: F32, scheme: Scheme) -> None:
    tensor = quantize_rtn(weight, scheme)
    step = np.repeat(np.abs(tensor.scale.astype(np.float32)), tensor.group_size, axis=1)
    off = np.abs(tensor.dequantize() - weight)
    low = 1 if scheme.symmetric and scheme.bits == 8 else 0
    clipped = (tensor.codes == low) | (tensor.codes == (1 << scheme.bits) - 1)
    assert (clipped | (off <= step * 0.5001) | (step == 0)).all()
    assert tensor.codes.min() >= low


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, (2, 128), elements=st.floats(-100, 100, width=32)))
def test_asymmetric_minimum_is_exact_in_fp16(weight: F32) -> None:
    tensor = quantize_rtn(weight, SCHEMES["int4_asym_g32"])
    minimum = tensor.scale.astype(np.float32) * tensor.zeros().astype(np.float32)
    np.testing.assert_array_equal(minimum.astype(np.float16).astype(np.float32), minimum)


def test_zeros_stay_zeros() -> None:
    for scheme in INTEGER:
        tensor = quantize_rtn(np.zeros((2, 128), np.float32), scheme)
        np.testing.assert_array_equal(tensor.dequantize(), 0)


def test_scale_beyond_fp16_is_refused() -> None:
    with pytest.raises(OverflowError, match="does not fit fp16"):
        quantize_rtn(np.full((1, 32), 1e30, np.float32), SCHEMES["int4_g32"])


@pytest.mark.parametrize("values", [(2e38, -2e38), (3.4e38, -3.4e38), (3e38, 0), (0, -3e38)], ids=str)
@pytest.mark.parametrize("scheme", INTEGER, ids=lambda scheme: scheme.name)
def test_a_range_beyond_float32_is_refused(scheme: Scheme, values: tuple[float, float]) -> None:
    weight = np.random.default_rng(7).standard_normal((3, 128)).astype(np.float32)
    weight[1, 3:5] = values
    for importance in (None, np.ones(128, np.float32)):
        with pytest.raises(OverflowError, match="does not fit fp16"):
            quantize_rtn(weight, scheme, importance)
