"""GPTQ and its sweeps: against the paper's own algorithm, column by column, and by property."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from converters.quantize.gptq import factorize, quantize_gptq
from converters.quantize.grid import IntegerGrid
from converters.quantize.rtn import choose_scales, quantize_rtn
from converters.quantize.scheme import SCHEMES, NumberType, Scheme
from converters.quantize.tensor import F32, QuantTensor

INTEGER = [scheme for scheme in SCHEMES.values() if scheme.is_integer]
INT4 = SCHEMES["int4_g32"]
DAMPING, SHRINKAGE = 0.01, 0.1  # the defaults
FACTORS = np.array([1, 0.94, 0.96, 0.98, 1.02, 1.04, 1.06], np.float32)


def problem(rows: int, width: int, seed: int = 0, samples: int = 400) -> tuple[F32, F32]:
    """A matrix and the second moments of inputs that are correlated and of very different size."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, width)).astype(np.float32)
    return weight, moments(inputs(rng, width, samples))


def inputs(rng: np.random.Generator, width: int, samples: int) -> F32:
    mixed = rng.standard_normal((samples, width)) @ (np.eye(width) + rng.standard_normal((width, width)) / width**0.5)
    sized: F32 = (mixed * np.exp(rng.standard_normal(width))).astype(np.float32)
    return sized


def moments(x: F32, other: F32 | None = None) -> F32:
    product: F32 = x.T @ (x if other is None else other) / np.float32(len(x))
    return product


def damped(hessian: F32) -> np.ndarray:
    diagonal = np.diag(hessian).astype(np.float64)
    added: np.ndarray = hessian + np.diag(DAMPING * diagonal.mean() + SHRINKAGE * diagonal)
    return added


def loss(weight: F32, tensor: QuantTensor, hessian: np.ndarray) -> float:
    error = (weight - tensor.dequantize()).astype(np.float64)
    return float(np.sum(error @ hessian * error))


def stored(scale: F32, scheme: Scheme) -> F32:
    """The nearest scale of 11 (symmetric) or 7 significant bits that fp16 holds."""
    if not scheme.symmetric:
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(np.rint(mantissa * 128) / 128, exponent)
    return scale.astype(np.float16).astype(np.float32)


def columns_in_order(hessian: F32, group: int) -> np.ndarray:
    """Groups by falling sum of the diagonal, columns of a group by falling diagonal."""
    diagonal = np.diag(hessian)
    groups = sorted(range(0, len(diagonal), group), key=lambda start: -diagonal[start : start + group].sum())
    return np.array([c for start in groups for c in sorted(range(start, start + group), key=lambda c: -diagonal[c])])


def naive_gptq(weight: F32, hessian: F32, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales by the paper's algorithm (Frantar et al. 2022, algorithm 1), a column at a time, in float64.

    The whole inverse Hessian, no lazy blocks; only the choice of the first scale is shared with what is tested.
    """
    rows, width = weight.shape
    group, top = scheme.group_size_for(width), (1 << scheme.bits) - 1
    order = columns_in_order(hessian, group)
    inverse = np.linalg.inv(damped(hessian)[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    work = weight[:, order].astype(np.float64)
    codes, scales = np.zeros((rows, width), int), np.zeros((rows, width // group), np.float32)
    for start in range(0, width, group):
        stop = start + group
        costs = 1 / np.diag(upper)[start:stop] ** 2
        values = np.ascontiguousarray(work[:, None, start:stop], np.float32)
        first, zeros = choose_scales(values, (costs / costs.mean()).astype(np.float32)[None], scheme)
        zero = zeros[:, 0].astype(int)
        least, best = np.full(rows, np.inf), work
        for factor in FACTORS if group <= 128 and scheme.bits == 4 else FACTORS[:1]:
            scale = stored(first[:, 0].astype(np.float32) * factor, scheme)
            tried, spent, found = work.copy(), np.zeros(rows), np.zeros((rows, group), int)
            for j in range(start, stop):
                inverted = np.divide(1, scale, out=np.zeros(rows), where=scale != 0)
                code = np.clip(np.rint(tried[:, j] * inverted) + zero, IntegerGrid.of(scheme).low, top)
                error = (tried[:, j] - scale * (code - zero)) / upper[j, j]
                tried[:, j:] -= error[:, None] * upper[j, j:]
                found[:, j - start] = code
                spent += error**2
            better = spent < least
            least = np.minimum(spent, least)
            best = np.where(better[:, None], tried, best)
            codes[:, order[start:stop]] = np.where(better[:, None], found, codes[:, order[start:stop]])
            number = order[start] // group
            scales[:, number] = np.where(better, scale, scales[:, number])
        work = best
    return codes, scales


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        *((scheme, 128) for scheme in INTEGER),
        (INT4, 64),
        (INT4, 608),
        (Scheme("int4_g256", NumberType.INT, 4, True, 256), 512),
        (Scheme("int4_channel", NumberType.INT, 4, True, 0), 384),
    ],
    ids=lambda value: value.name if isinstance(value, Scheme) else value,
)
def test_codes_are_those_of_the_papers_algorithm(scheme: Scheme, width: int) -> None:
    weight, hessian = problem(70, width, samples=4 * width)
    tensor = quantize_gptq(weight, hessian, scheme, damping=DAMPING, shrinkage=SHRINKAGE, sweeps=0)
    codes, scales = naive_gptq(weight, hessian, scheme)
    # Float32 sums may round a value that lies between two codes the other way, which moves the rest of its row; at 8
    # bits, or in wide rows, some do.
    same = (tensor.codes == codes).all(axis=1) & (tensor.scale == scales).all(axis=1)
    assert same.mean() >= (0.95 if width <= 128 and scheme.bits == 4 else 0.8)


@pytest.mark.parametrize("scheme", INTEGER, ids=lambda scheme: scheme.name)
def test_each_step_beats_the_one_before(scheme: Scheme) -> None:
    weight, hessian = problem(40, 256, seed=1)
    importance = (np.diag(hessian) / np.diag(hessian).mean()).astype(np.float32)
    target = damped(hessian)
    plain = loss(weight, quantize_rtn(weight, scheme, importance), target)
    losses = [loss(weight, quantize_gptq(weight, hessian, scheme, sweeps=sweeps), target) for sweeps in range(6)]
    assert losses[0] < 0.8 * plain
    assert losses[5] < losses[0]
    for before, after in pairwise(losses):
        assert after <= before * (1 + 1e-6)


def test_after_the_sweeps_no_single_code_can_do_better() -> None:
    weight, hessian = problem(8, 64, seed=2)
    tensor = quantize_gptq(weight, hessian, INT4, sweeps=100)
    target = damped(hessian)
    scale = np.repeat(tensor.scale.astype(np.float64), 32, axis=1)
    slope = (weight - tensor.dequantize()) @ target
    for move in (-1, 1):
        gain = 2 * move * scale * slope - (move * scale) ** 2 * np.diag(target)
        allowed = (tensor.codes.astype(int) + move >= 0) & (tensor.codes.astype(int) + move <= 15)
        assert (gain[allowed] <= 0.01 * (scale**2 * np.diag(target))[allowed]).all()


def test_scales_fit_their_codes() -> None:
    """No scale of 2 % more or less is better with the codes as they are."""
    weight, hessian = problem(8, 64, seed=3)
    tensor = quantize_gptq(weight, hessian, INT4, sweeps=100)
    best = loss(weight, tensor, damped(hessian))
    for row in range(8):
        for group in range(2):
            for factor in (0.98, 1.02):
                scale = tensor.scale.copy()
                scale[row, group] *= np.float16(factor)
                other = QuantTensor(tensor.codes, scale, None, 4)
                assert loss(weight, other, damped(hessian)) > best


@pytest.mark.parametrize("scheme", INTEGER, ids=lambda scheme: scheme.name)
def test_scales_and_codes_are_stored_as_by_rounding(scheme: Scheme) -> None:
    weight, hessian = problem(5, 128, seed=4)
    for size in (1.0, 1e-4, 1e3):
        tensor = quantize_gptq(weight * np.float32(size), hessian, scheme)
        other = quantize_rtn(weight * np.float32(size), scheme)
        assert (tensor.scale.dtype, tensor.scale.shape) == (other.scale.dtype, other.scale.shape)
        assert (tensor.codes.dtype, tensor.codes.shape) == (other.codes.dtype, other.codes.shape)
        assert tensor.codes.min() >= IntegerGrid.of(scheme).low and tensor.codes.max() < 1 << scheme.bits
        assert (tensor.zero is None) == scheme.symmetric
        if not scheme.symmetric:
            minimum = tensor.scale.astype(np.float32) * tensor.zeros().astype(np.float32)
            np.testing.assert_array_equal(minimum.astype(np.float16).astype(np.float32), minimum)


def test_weights_on_the_grid_come_back_exactly() -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 16, (8, 64))
    codes[:, ::32] = 0
    scale = np.repeat(rng.uniform(0.01, 0.1, (8, 2)).astype(np.float16).astype(np.float32), 32, axis=1)
    weight = ((codes - 8) * scale).astype(np.float32)
    tensor = quantize_gptq(weight, problem(1, 64)[1], INT4)
    np.testing.assert_array_equal(tensor.dequantize(), weight)


def test_uncorrelated_inputs_of_one_size_leave_nothing_to_gptq() -> None:
    """Without sweeps and with a unit Hessian, values are just rounded: each to within half a step, or clipped."""
    weight = np.random.default_rng(6).standard_normal((9, 64)).astype(np.float32)
    tensor = quantize_gptq(weight, np.eye(64, dtype=np.float32), INT4, sweeps=0)
    step = np.repeat(np.abs(tensor.scale.astype(np.float32)), 32, axis=1)
    clipped = (tensor.codes == 0) | (tensor.codes == 15)
    assert (clipped | (np.abs(tensor.dequantize() - weight) <= 0.5001 * step)).all()


@pytest.mark.parametrize("dead", [slice(3, 9), slice(32, 64), slice(0, 96)], ids=["columns", "group", "all"])
def test_dead_columns_keep_their_numbers(dead: slice) -> None:
    weight, hessian = problem(6, 96, seed=7)
    hessian[dead] = hessian[:, dead] = 0
    tensor = quantize_gptq(weight, hessian, INT4)
    step = np.repeat(np.abs(tensor.scale.astype(np.float32)), 32, axis=1)[:, dead]
    off = np.abs(tensor.dequantize() - weight)[:, dead]
    clipped = ((tensor.codes == 0) | (tensor.codes == 15))[:, dead]
    assert (clipped | (off <= 0.51 * step)).all()
    assert (step > 0).all() and clipped.mean() < 0.5


def test_few_samples_are_enough() -> None:
    """A Hessian of rank 5 needs its damping; one that is none, more than there is."""
    weight, hessian = problem(6, 64, seed=8, samples=5)
    assert loss(weight, quantize_gptq(weight, hessian, INT4), hessian) < 0.2 * loss(
        weight, quantize_rtn(weight, INT4), hessian
    )
    slightly = hessian - np.float32(0.05 * np.diag(hessian).mean()) * np.eye(64, dtype=np.float32)
    assert np.isfinite(quantize_gptq(weight, slightly, INT4, shrinkage=0).dequantize()).all()
    assert np.isfinite(quantize_gptq(weight, hessian, INT4, damping=0, shrinkage=0).dequantize()).all()
    with pytest.raises(ValueError, match="singular"):
        quantize_gptq(weight, hessian - 100 * np.trace(hessian) * np.eye(64, dtype=np.float32), INT4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_moments_that_are_not_finite_are_refused(value: float) -> None:
    weight, hessian = problem(2, 64)
    bad = hessian.copy()
    bad[3, 5] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize_gptq(weight, bad, INT4)
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize_gptq(weight, hessian, INT4, bad)


def test_scale_beyond_fp16_is_refused() -> None:
    with pytest.raises(OverflowError, match="does not fit fp16"):
        quantize_gptq(np.full((1, 32), 1e30, np.float32), np.eye(32, dtype=np.float32), INT4)


@pytest.mark.parametrize("scheme", INTEGER, ids=lambda scheme: scheme.name)
def test_rows_do_not_depend_on_one_another(scheme: Scheme) -> None:
    """One row alone, and zero rows: what a row becomes is its own affair but for the rounding of sums."""
    weight, hessian = problem(67, 128, seed=9)
    weight[66] = 0
    whole = quantize_gptq(weight, hessian, scheme)
    alone = quantize_gptq(weight[65:66], hessian, scheme)
    np.testing.assert_array_equal(whole.dequantize()[66], 0)
    target = damped(hessian)
    part = QuantTensor(whole.codes[65:66], whole.scale[65:66], whole.zeros()[65:66], whole.bits)
    assert loss(weight[65:66], alone, target) == pytest.approx(loss(weight[65:66], part, target), rel=0.05)


def test_group_of_the_whole_row() -> None:
    weight, hessian = problem(6, 96, seed=10)
    channel = Scheme("int4_channel", NumberType.INT, 4, True, 0)
    same = Scheme("int4_g96", NumberType.INT, 4, True, 96)
    one, other = quantize_gptq(weight, hessian, channel), quantize_gptq(weight, hessian, same)
    assert one.scale.shape == (6, 1)
    np.testing.assert_array_equal(one.codes, other.codes)


def test_same_inputs_give_the_same_codes() -> None:
    weight, hessian = problem(33, 256, seed=11)
    one, other = quantize_gptq(weight, hessian, INT4), quantize_gptq(weight, hessian, INT4)
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.scale, other.scale)


def test_matches_the_outputs_of_the_float_model() -> None:
    """GPTAQ: the layer sees noisy inputs and has to give what the clean ones give."""
    rng = np.random.default_rng(12)
    weight = rng.standard_normal((20, 128)).astype(np.float32)
    clean = inputs(rng, 128, 1000)
    noisy = (clean + 0.3 * clean.std(axis=0) * rng.standard_normal(clean.shape)).astype(np.float32)
    hessian, cross = moments(noisy), moments(clean, noisy)

    def off(tensor: QuantTensor) -> float:
        return float(np.square(clean @ weight.T - noisy @ tensor.dequantize().T).sum())

    matched, unmatched = off(quantize_gptq(weight, hessian, INT4, cross)), off(quantize_gptq(weight, hessian, INT4))
    assert matched < 0.9 * unmatched
    same = quantize_gptq(weight, hessian, INT4, hessian)
    assert (same.codes == quantize_gptq(weight, hessian, INT4).codes).mean() > 0.9, "equal inputs change nothing"


def test_makes_up_for_what_its_output_is_added_to() -> None:
    """The sum is to match: part of what the other addend lacks can be told from the layer's inputs."""
    rng = np.random.default_rng(13)
    weight = rng.standard_normal((20, 128)).astype(np.float32)
    x = inputs(rng, 128, 1000)
    lacking = x @ rng.standard_normal((128, 20)).astype(np.float32) / 10
    lacking += rng.standard_normal(lacking.shape).astype(np.float32)
    hessian = moments(x)
    deficit = (lacking.T @ x / len(x)).astype(np.float32)

    def off(tensor: QuantTensor) -> float:
        return float(np.square(x @ weight.T + lacking - x @ tensor.dequantize().T).sum())

    fitted, unfitted = (
        off(quantize_gptq(weight, hessian, INT4, None, deficit)),
        off(quantize_gptq(weight, hessian, INT4)),
    )
    assert fitted < 0.8 * unfitted
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize_gptq(weight, hessian, INT4, None, np.full_like(deficit, np.nan))


@pytest.mark.parametrize("width", [1, 255, 256, 257, 1500])
def test_factor_is_upper_triangular_and_gives_the_matrix_back(width: int) -> None:
    matrix = damped(problem(1, width, samples=2 * width)[1]).astype(np.float32)
    factor = matrix.copy()
    factorize(factor)
    assert not np.tril(factor, -1).any()
    np.testing.assert_allclose(factor @ factor.T, matrix, atol=2e-5 * np.abs(matrix).max())
    with pytest.raises(np.linalg.LinAlgError):
        factorize(-matrix)
