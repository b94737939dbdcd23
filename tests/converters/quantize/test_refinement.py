"""AdaRound and SignRound: against the papers' procedures as torch differentiates them, on inputs, and by property."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from converters.arrays import NumpyProducts, computing_by
from converters.quantize import refinement
from converters.quantize.adaround import refine_adaround
from converters.quantize.gptq import quantize_gptq
from converters.quantize.grid import IntegerGrid
from converters.quantize.refinement import Refine, Rows
from converters.quantize.rtn import quantize_rtn
from converters.quantize.scheme import SCHEMES, NumberType, Scheme
from converters.quantize.signround import refine_signround
from converters.quantize.tensor import F32, QuantTensor

WEIGHT = 10  # of the regularizer
INT4, ASYMMETRIC = SCHEMES["int4_g32"], SCHEMES["int4_asym_g32"]
BOTH = pytest.mark.parametrize("refine", [refine_adaround, refine_signround])


def inputs(width: int, seed: int = 0) -> F32:
    """f32[samples, in], correlated and of different size."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((4 * width, width)) @ (np.eye(width) + rng.standard_normal((width, width)) / width**0.5)
    sized: F32 = (mixed * np.exp(rng.standard_normal(width) / 2) / (4 * width) ** 0.5).astype(np.float32)
    return sized


def weights(rows: int, width: int, seed: int = 1) -> F32:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def losses(weight: F32, tensor: QuantTensor, x: F32) -> np.ndarray:
    """f64[out]: the squared errors of the outputs for inputs x."""
    off = x.astype(np.float64) @ (weight.astype(np.float64) - tensor.dequantize()).T
    total: np.ndarray = np.square(off).sum(axis=0)
    return total


def starts(weight: F32, x: F32, scheme: Scheme) -> list[QuantTensor]:
    return [quantize_rtn(weight, scheme), quantize_gptq(weight, x.T @ x, scheme, sweeps=0)]


def grid(tensor: QuantTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales, zeros and codes in float64, each of the matrix's shape."""
    size = tensor.group_size
    scale, zero = (np.repeat(part.astype(np.float64), size, axis=1) for part in (tensor.scale, tensor.zeros()))
    return torch.from_numpy(scale), torch.from_numpy(zero), torch.from_numpy(tensor.codes.astype(np.float64))


def anchors(weight: F32, tensor: QuantTensor) -> torch.Tensor:
    scale, zero, codes = grid(tensor)
    steps = torch.from_numpy(weight.astype(np.float64)) / scale
    return torch.minimum(torch.maximum(steps, codes - zero - 0.49), codes - zero + 0.49)


def naive_adaround(weight: F32, x: F32, start: QuantTensor, steps: int) -> np.ndarray:
    """Codes by torch's gradients and its Adam; the layer runs on its inputs."""
    inputs, target = torch.from_numpy(x.astype(np.float64)), torch.from_numpy(weight.astype(np.float64))
    (scale, zero, _), anchor, top = grid(start), anchors(weight, start), (1 << start.bits) - 1
    floor = torch.minimum(torch.maximum(torch.floor(anchor), -zero), top - 1 - zero)
    up = torch.clip(anchor - floor, 0.01, 0.99)
    logit = torch.log((up + 0.1) / (1.1 - up)).requires_grad_()
    unit = 1 / (scale.square() * inputs.square().sum(0)).mean(1)
    adam = torch.optim.Adam([logit], lr=0.03)
    for step in range(steps):
        h = torch.clip(1.2 * torch.sigmoid(logit) - 0.1, 0, 1)
        loss = ((inputs @ (target - scale * (floor + h)).T).square().sum(0) * unit).sum()
        if step >= 0.2 * steps:
            power = 20 - 18 * (step / steps - 0.2) / 0.8
            loss = loss + WEIGHT * (1 - (2 * h - 1).abs() ** power).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    codes: np.ndarray = (floor + (logit >= 0) + zero).detach().numpy()
    return codes


def naive_signround(weight: F32, x: F32, start: QuantTensor, steps: int) -> np.ndarray:
    """Codes by the signs of torch's gradients; rounding, of scales too, is passed straight through."""
    inputs, target = torch.from_numpy(x.astype(np.float64)), torch.from_numpy(weight.astype(np.float64))
    (scale, zero, codes), anchor, top = grid(start), anchors(weight, start), (1 << start.bits) - 1
    shift = torch.zeros_like(scale, requires_grad=True)
    factor = torch.ones(start.scale.shape, dtype=torch.float64, requires_grad=True)
    best, least = codes.clone(), torch.full((len(codes),), torch.inf, dtype=torch.float64)
    for step in range(steps + 1):
        wide = factor.repeat_interleave(start.group_size, dim=1)
        stored = scale * wide + (on_grid(scale * wide, start) - scale * wide).detach()
        moved = anchor * scale / stored + shift
        number = torch.clamp(moved + (torch.round(moved) - moved).detach(), -zero, top - zero)
        loss = (inputs @ (target - stored * number).T).square().sum(0)
        better = loss.detach() < least
        best[better], least[better] = (number + zero).detach()[better], loss.detach()[better]
        shift.grad = factor.grad = None
        loss.sum().backward()
        rate = (1 - step / steps) / steps
        with torch.no_grad():
            assert shift.grad is not None and factor.grad is not None
            shift.sub_(rate * shift.grad.sign()).clip_(-0.5, 0.5)
            factor.sub_(rate * factor.grad.sign()).clip_(0.5, 1.5)
    found: np.ndarray = best.numpy()
    return found


def on_grid(scale: torch.Tensor, tensor: QuantTensor) -> torch.Tensor:
    """The nearest scale of 11 (symmetric) or 7 significant bits."""
    mantissa, exponent = np.frexp(scale.detach().numpy())
    bits = 2.0 ** (11 if tensor.zero is None else 7)
    return torch.from_numpy(np.ldexp(np.rint(mantissa * bits) / bits, exponent))


@pytest.mark.parametrize("scheme", [INT4, ASYMMETRIC], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(("refine", "naive"), [(refine_adaround, naive_adaround), (refine_signround, naive_signround)])
def test_goes_where_gradients_of_the_layer_lead(
    refine: Callable[..., QuantTensor], naive: Callable[..., np.ndarray], scheme: Scheme
) -> None:
    x, weight = inputs(64), weights(12, 64)
    start = quantize_rtn(weight, scheme)
    refined = refine(weight, x.T @ x, start, scheme, steps=50)
    codes = naive(weight, x, start, 50)
    # Rows that did not get better keep what they had in the one and not in the other; sums in float32 round some values
    # the other way.
    changed = (refined.codes != start.codes).any(axis=1)
    assert changed.mean() > 0.5
    assert (refined.codes != start.codes)[changed].mean() > 0.05
    assert (refined.codes == codes)[changed].mean() > 0.98


@BOTH
@pytest.mark.parametrize("scheme", [INT4, ASYMMETRIC, SCHEMES["int4_g128"]], ids=lambda scheme: scheme.name)
def test_no_row_gets_worse(refine: Refine, scheme: Scheme) -> None:
    x, weight = inputs(128), weights(20, 128)
    weight[3] = 0
    rounded, fitted = starts(weight, x, scheme)
    for start, most in ((rounded, 0.9), (fitted, 1.0), (quantize_gptq(weight, x.T @ x, scheme), 1.0)):
        refined = refine(weight, x.T @ x, start, scheme)
        before, after = losses(weight, start, x), losses(weight, refined, x)
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() <= most * before.sum()
        assert refined.codes.min() >= IntegerGrid.of(scheme).low and refined.codes.max() < 1 << scheme.bits
        assert (refined.codes.dtype, refined.scale.dtype) == (start.codes.dtype, start.scale.dtype)
        assert (refined.zero is None) == scheme.symmetric
        minimum = refined.scale.astype(np.float32) * refined.zeros().astype(np.float32)
        if not scheme.symmetric:
            np.testing.assert_array_equal(minimum.astype(np.float16).astype(np.float32), minimum)
    np.testing.assert_array_equal(refined.dequantize()[3], 0)


def test_adaround_comes_near_the_best_of_all_choices() -> None:
    """Of 2^8 ways to round a row of eight up or down; the scales are the start's."""
    scheme = Scheme("int4_g8", NumberType.INT, 4, True, 8)
    x, weight = inputs(8, seed=3), weights(40, 8, seed=4)
    start = quantize_rtn(weight, scheme)
    scale, zero, _ = (part.numpy() for part in grid(start))
    floor = np.clip(np.floor(anchors(weight, start).numpy()) + zero, 0, 14)
    choices = np.array(list(product([0, 1], repeat=8)))
    off = weight[:, None] - scale[:, None] * (floor[:, None] + choices - zero[:, None])
    best = np.square(off @ x.T).sum(-1).min(axis=1).sum()
    first, reached = losses(weight, start, x).sum(), losses(weight, refine_adaround(weight, x.T @ x, start, scheme), x)
    assert best <= reached.sum() < best + 0.5 * (first - best)


@BOTH
def test_rows_do_not_know_of_one_another(refine: Refine, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs(64), weights(23, 64)
    start = quantize_rtn(weight, INT4)
    whole = refine(weight, x.T @ x, start, INT4)
    monkeypatch.setattr(refinement, "REFINED_ELEMENTS", 10 * 64)
    parts = refine(weight, x.T @ x, start, INT4)
    assert (whole.codes == parts.codes).mean() > 0.98, "but for the rounding of sums"
    assert losses(weight, parts, x).sum() == pytest.approx(losses(weight, whole, x).sum(), rel=0.02)


def test_refines_what_gptq_is_to_reach() -> None:
    """Weights matched to the float model, which sees other inputs; at 8 bits it is left out."""
    x, weight = inputs(128), weights(40, 128)
    clean = x + 0.3 * x.std(axis=0) * np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)
    hessian, cross = x.T @ x, (clean.T @ x).astype(np.float32)
    plain, told = quantize_gptq(weight, hessian, INT4, cross), []

    def refine(target: F32, damped: F32, start: QuantTensor, scheme: Scheme) -> QuantTensor:
        told.append(scheme)
        np.testing.assert_array_equal(start.codes, plain.codes)
        np.testing.assert_array_equal(damped - np.diag(np.diag(damped)), hessian - np.diag(np.diag(hessian)))
        assert (np.diag(damped) > 1.09 * np.diag(hessian)).all()
        assert np.square((clean - x) @ weight.T).sum() > np.square(clean @ weight.T - x @ target.T).sum()
        return refine_signround(target, damped, start, scheme, steps=3)

    quantize_gptq(weight, hessian, INT4, cross, refine=refine)
    quantize_gptq(weight, hessian, SCHEMES["int8_g32"], cross, refine=refine)
    assert told == [INT4]


@BOTH
def test_what_is_heavy_is_asked_of_the_chosen_products(refine: Callable[..., QuantTensor]) -> None:
    class Counting(NumpyProducts):
        count = 0

        def product(self, a: F32, b: F32) -> F32:
            self.count += 1
            return super().product(a, b)

    x, weight = inputs(64), weights(5, 64)
    start, counting = quantize_rtn(weight, INT4), Counting()
    with computing_by(counting):
        refined = refine(weight, x.T @ x, start, INT4, steps=20)
    assert counting.count >= 20
    np.testing.assert_array_equal(refined.codes, refine(weight, x.T @ x, start, INT4, steps=20).codes)


def test_only_what_costs_less_is_kept() -> None:
    x, weight = inputs(64), weights(6, 64)
    start = quantize_rtn(weight, INT4)

    def descend(rows: Rows) -> tuple[F32, F32]:
        """The even rows get better, the others worse."""
        worse = np.arange(6)[:, None] % 2
        return rows.codes, rows.scale * np.where(worse, 1.5, 0.75).astype(np.float32)

    wide = replace(start, scale=start.scale * np.float16(1.25))
    kept = refinement.refine(weight, x.T @ x, wide, descend)
    np.testing.assert_array_equal(kept.scale[1::2], wide.scale[1::2])
    np.testing.assert_array_equal(kept.scale[::2], (wide.scale.astype(np.float32) * 0.75).astype(np.float16)[::2])


def test_a_minimum_beyond_fp16_is_refused() -> None:
    weight = np.linspace(-60000, 0, 32, dtype=np.float32)[None]
    start = quantize_rtn(weight, ASYMMETRIC)
    with pytest.raises(OverflowError, match="does not fit fp16"):
        refinement.refine(weight, np.eye(32, dtype=np.float32), start, lambda rows: (rows.codes, rows.scale * 2))


@BOTH
def test_dead_columns_and_scales_of_zero(refine: Refine) -> None:
    x, weight = inputs(64), weights(5, 64)
    x[:, 40:50] = 0
    weight[1, :32] = 0
    start = quantize_rtn(weight, INT4)
    refined = refine(weight, x.T @ x, start, INT4)
    off = np.abs(refined.dequantize() - weight)[:, 40:50]
    assert (off <= np.abs(start.dequantize() - weight)[:, 40:50] + np.abs(start.scale[:, 1:].astype(np.float32))).all()
    np.testing.assert_array_equal(refined.dequantize()[1, :32], 0)
    nothing = refine(weight, np.zeros((64, 64), np.float32), start, INT4)
    np.testing.assert_array_equal(nothing.codes, start.codes)
