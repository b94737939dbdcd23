"""Half-quadratic quantization: scales that let a few large errors be, so that the many small ones get smaller.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (no arXiv id): instead of the squared
error of a group, sum |w - w'|^p is to fall, p < 1. An auxiliary error e turns it into two problems with closed forms,
solved in turn while beta grows:

    e <- shrink(w - w', beta),  shrink(x, beta) = sign(x) * max(|x| - |x|^(p - 1) / beta, 0)
    the grid <- least squares against w - e

The paper keeps the scale, and the zero is a real number: the mean of code - (w - e) / scale. Our grids differ, and so
do the second steps:

- symmetric: the zero is fixed and the scale moves, scale = <w - e, u> / <u, u> with u = code - zero;
- asymmetric: the zero is the paper's mean, rounded; the scale then moves as above, in 7 significant bits.

It starts from the least-squares scales of rtn.py. Errors are shrunk in steps of the grid, which makes the outcome
independent of the weights' magnitude; the paper's beta is on weights, whose errors of 0.001 it would shrink to nothing.
Each group stops when its sum, under the scale as it is stored, no longer falls: no group gets worse, rows do not know
of one another, and no text is needed. Where columns have an importance, it weighs the sums and the means.

Measured on the sample model, int4_g32 (KL divergence of 2048 held-out tokens): worse than where it starts, 0.297 for
0.281, and 0.158 for 0.150 with the importance of random tokens.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from converters.quantize.grid import IntegerGrid
from converters.quantize.half import scales_to_fp16
from converters.quantize.rtn import quantize_rtn
from converters.quantize.rtn_search import round_codes
from converters.quantize.scheme import Scheme
from converters.quantize.tensor import F32, U8, QuantTensor

# The defaults of the authors' code (mobiusml/hqq).
NORM = 0.7  # p
_BETA, _GROWTH = 10.0, 1.01  # of beta, a round
_ROUNDS = 20  # at most
_ROUND = np.float32(12582912.0)  # see rtn_search.py
_MOST, _NORMAL, _SUBNORMAL = np.float32(65504), np.float32(2**-14), np.float32(0.75)  # see grid.py


def quantize_hqq(weight: F32, scheme: Scheme, importance: F32 | None = None, norm: float = NORM) -> QuantTensor:
    """Quantize rows f32[out, in] of a matrix to an integer scheme; `in` must be a multiple of its group size.

    importance: f32[in], positive: how much an error in each column counts. None: all the same.
    norm: p of the error |w - w'|^p that is to fall, 0 < p <= 1.
    OverflowError if a scale does not fit fp16.
    """
    assert 0 < norm <= 1, norm
    start = quantize_rtn(weight, scheme, importance)
    groups = np.ascontiguousarray(weight).reshape(*start.scale.shape, -1)
    counts = (
        np.ones(weight.shape[1], np.float32) if importance is None else np.ascontiguousarray(importance, np.float32)
    )
    grid, by_columns = IntegerGrid.of(scheme), counts.reshape(groups.shape[1:])
    scale, zero = start.scale.astype(np.float32), np.ascontiguousarray(start.zeros())
    _refine(groups, by_columns, scale, zero, grid.low, grid.top, scheme.symmetric, np.float32(norm), grid.split)
    own = None if scheme.symmetric else zero
    stored = scales_to_fp16(scale, own, weight)
    codes = round_codes(groups, stored.astype(np.float32), zero, grid.low, grid.top)
    return QuantTensor(codes.reshape(weight.shape), stored, own, scheme.bits)


@njit(cache=True, nogil=True, error_model="numpy")
def _refine(
    groups: F32, counts: F32, scale: F32, zero: U8, low: int, top: int, symmetric: bool, norm: np.float32, split: float
) -> None:  # pragma: no cover
    """Improve scale f32[rows, m] and zero u8[rows, m] of groups f32[rows, m, size] where they lie.

    split: that of the grid (grid.py).
    """
    rows, m, _ = groups.shape
    least, most = np.float32(low), np.float32(top)
    for row in range(rows):
        for column in range(m):
            w, count = groups[row, column], counts[column]
            step, shift = scale[row, column], np.float32(zero[row, column])
            if step == 0:
                continue
            error = _error(w, count, step, shift, least, most, norm)
            beta = np.float32(_BETA)
            for _ in range(_ROUNDS):
                step, shift = _fit(w, count, step, shift, least, most, symmetric, norm, beta, split)
                if step == 0:
                    break
                reached = _error(w, count, step, shift, least, most, norm)
                if not reached < error:
                    break
                error, beta = reached, beta * np.float32(_GROWTH)
                scale[row, column], zero[row, column] = step, np.uint8(np.int32(shift))


@njit(cache=True, nogil=True, error_model="numpy")
def _fit(
    w: F32,
    count: F32,
    step: np.float32,
    shift: np.float32,
    least: np.float32,
    most: np.float32,
    symmetric: bool,
    norm: np.float32,
    beta: np.float32,
    split: float,
) -> tuple[np.float32, np.float32]:  # pragma: no cover
    """The next scale and zero of a group: both of the method's steps. Scale 0 where least squares has none that fp16
    can hold."""
    inverse = np.float32(1) / step
    if not symmetric:
        total, mean = np.float32(0), np.float32(0)
        for j in range(len(w)):
            code, target = _code_and_target(w[j] * inverse, shift, least, most, norm, beta)
            total += count[j]
            mean += count[j] * (code - target)
        moved = (mean / total + _ROUND) - _ROUND
    else:
        moved = shift
    product, square = np.float32(0), np.float32(0)
    for j in range(len(w)):
        code, target = _code_and_target(w[j] * inverse, shift, least, most, norm, beta)
        u = code - min(max(moved, least), most)
        product += count[j] * (target * u)
        square += count[j] * (u * u)
    if not (square > 0 and (symmetric or product > 0)):
        return np.float32(0), shift
    return _on_grid(step * (product / square), split), min(max(moved, least), most)


@njit(cache=True, nogil=True)
def _on_grid(scale: np.float32, split: float) -> np.float32:  # pragma: no cover
    """IntegerGrid.nearest of one scale."""
    large = scale * np.float32(split)
    rounded = large - (large - scale)
    if abs(rounded) < _NORMAL:
        rounded = (rounded + _SUBNORMAL) - _SUBNORMAL
    return rounded if abs(rounded) <= _MOST else np.float32(0)


@njit(cache=True, nogil=True, error_model="numpy")
def _code_and_target(
    x: np.float32, shift: np.float32, least: np.float32, most: np.float32, norm: np.float32, beta: np.float32
) -> tuple[np.float32, np.float32]:  # pragma: no cover
    """The code of a weight x, and x less its shrunk error; in steps."""
    code = min(max((x + _ROUND) - _ROUND + shift, least), most)
    error = x - (code - shift)
    size = abs(error)
    left = size - size ** (norm - np.float32(1)) / beta if size > 0 else np.float32(0)
    return code, x - (np.copysign(left, error) if left > 0 else np.float32(0))


@njit(cache=True, nogil=True, error_model="numpy")
def _error(
    w: F32, count: F32, step: np.float32, shift: np.float32, least: np.float32, most: np.float32, norm: np.float32
) -> np.float32:  # pragma: no cover
    """sum of count * |w - w'|^p."""
    inverse, total = np.float32(1) / step, np.float32(0)
    for j in range(len(w)):
        code = min(max((w[j] * inverse + _ROUND) - _ROUND + shift, least), most)
        total += count[j] * abs(w[j] - step * (code - shift)) ** norm
    return total
