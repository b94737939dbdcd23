"""The round-to-nearest quantizer: against a naive search, by hand, and by property."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from converters.quantize.gptq import quantize_gptq
from converters.quantize.grid import IntegerGrid
from converters.quantize.hqq import quantize_hqq
from converters.quantize.rtn import quantize_rtn
from converters.quantize.scheme import SCHEMES, Scheme
from converters.quantize.tensor import F32, QuantTensor

INTEGER = [scheme for scheme in SCHEMES.values() if scheme.is_integer]


def gptq_of_like_inputs(weight: F32, scheme: Scheme) -> QuantTensor:
    return quantize_gptq(weight, np.eye(weight.shape[1], dtype=np.float32), scheme)


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
    blocks = [(0, 5), (5, 6), (6, 37)] * 8
    with ThreadPoolExecutor(6) as threads:
        parts = list(threads.map(lambda rows: quantize_rtn(weight[slice(*rows)], scheme), blocks))
    for (start, stop), part in zip(blocks, parts, strict=True):
        assert part.codes.tobytes() == whole.codes[start:stop].tobytes()
        assert part.scale.tobytes() == whole.scale[start:stop].tobytes()
        assert part.zeros().tobytes() == whole.zeros()[start:stop].tobytes()


# From where fp16 has no scale to where it has none again.
values = st.floats(-3e5, 3e5, width=32, allow_subnormal=False)


def quantized_if_possible(weight: F32, scheme: Scheme) -> QuantTensor | None:
    """Large values may be refused, others not."""
    try:
        return quantize_rtn(weight, scheme)
    except OverflowError:
        assert np.abs(weight).max() > 6e4
        return None


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, (2, 128), elements=values), st.sampled_from(INTEGER))
def test_every_value_is_within_half_a_step_or_clipped(weight: F32, scheme: Scheme) -> None:
    tensor = quantized_if_possible(weight, scheme)
    if tensor is None:
        return
    step = np.repeat(np.abs(tensor.scale.astype(np.float32)), tensor.group_size, axis=1)
    off = np.abs(tensor.dequantize() - weight)
    low = 1 if scheme.symmetric and scheme.bits == 8 else 0
    clipped = (tensor.codes == low) | (tensor.codes == (1 << scheme.bits) - 1)
    assert (clipped | (off <= step * 0.5001) | (step == 0)).all()
    assert tensor.codes.min() >= low


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, (2, 128), elements=st.floats(-2e5, 2e5, width=32)))
def test_asymmetric_minimum_is_exact_in_fp16(weight: F32) -> None:
    tensor = quantized_if_possible(weight, SCHEMES["int4_asym_g32"])
    if tensor is None:
        return
    minimum = tensor.scale.astype(np.float32) * tensor.zeros().astype(np.float32)
    np.testing.assert_array_equal(minimum.astype(np.float16).astype(np.float32), minimum)


def test_zeros_stay_zeros() -> None:
    for scheme in INTEGER:
        tensor = quantize_rtn(np.zeros((2, 128), np.float32), scheme)
        np.testing.assert_array_equal(tensor.dequantize(), 0)


@pytest.mark.parametrize("name", ["int8_channel", "int8_g32", "int4_g32", "int4_asym_g32"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_best_of_the_few_scales_that_fp16_has_for_tiny_weights(name: str, weighted: bool) -> None:
    """Rows whose scales lie between 2**-26 and 2**-21, where the nearest scale may be 0 or clip what matters most."""
    rng = np.random.default_rng(8)
    scheme, levels = SCHEMES[name], 127 if "int8" in name else 8
    sizes = np.exp2(np.linspace(-26, -21, 60)) * levels
    weight = (rng.uniform(-1, 1, (60, 32)) * sizes[:, None]).astype(np.float32)
    weight[:, 3] = sizes
    importance = rng.uniform(0.5, 2, 32).astype(np.float32) if weighted else None
    tensor = quantize_rtn(weight, scheme, importance)
    counts = np.ones(32) if importance is None else importance
    low, top = IntegerGrid.of(scheme).low, IntegerGrid.of(scheme).top

    def errors(scale: np.ndarray) -> np.ndarray:
        zero = tensor.zeros().astype(np.float64)
        steps = np.divide(weight, scale, out=np.zeros(weight.shape), where=scale != 0)
        codes = np.clip(np.rint(steps) + zero, low, top)
        squares = np.square((codes - zero) * scale - weight, dtype=np.float64) * counts
        sums: np.ndarray = squares.sum(axis=1)
        return sums

    stored = tensor.scale.astype(np.float64)
    best = np.min([errors(np.full((60, 1), sign * k * 2.0**-24)) for k in range(40) for sign in (1, -1)], axis=0)
    assert (errors(stored) <= 1.05 * best).mean() > 0.9
    assert errors(stored).sum() <= 1.05 * best.sum()


def test_a_row_that_is_smaller_than_half_a_scale_is_not_lost() -> None:
    weight = (np.random.default_rng(9).uniform(-1, 1, (1, 128)) * 3.1e-6).astype(np.float32)
    tensor = quantize_rtn(weight, SCHEMES["int8_channel"])
    assert np.linalg.norm(tensor.dequantize() - weight) < 0.03 * np.linalg.norm(weight)


@pytest.mark.parametrize("quantize", [quantize_rtn, quantize_hqq, gptq_of_like_inputs])
def test_a_minimum_beyond_fp16_is_refused(quantize: Callable[[F32, Scheme], QuantTensor]) -> None:
    """The scale fits, the minimum that Q4_1 and MLX store does not."""
    scheme, weight = SCHEMES["int4_asym_g32"], np.linspace(-120000, 0, 32, dtype=np.float32)[None]
    assert np.isfinite(quantize(-weight, scheme).dequantize()).all(), "its zero is 0"
    with pytest.raises(OverflowError, match="need a scale times its zero that does not fit fp16"):
        quantize(weight, scheme)


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
