"""The search behind Q2_K, Q4_K and Q5_K: value = d * scale * code - dmin * minimum.

A superblock is 256 values in 8 or 16 sub-blocks. Each sub-block has two small integers, its scale and its minimum, that
the superblock's two fp16 factors d and dmin turn into numbers. Three steps:

1. Each sub-block by itself: every candidate lays the sub-block's range a little differently over the codes 0 ... top,
   and weighted least squares gives the best real scale and minimum for the codes that result. (ggml fixes the low end
   of the range and varies the high one.)
2. With the codes fixed, a sub-block's error is a quadratic form in (scale, minimum). For several d and dmin, scale and
   minimum are rounded together: for the two integers next to the best scale, the minimum that is best *given that
   scale*. (ggml rounds them independently, which throws away what they have in common, and tries one d and one dmin.)
3. Codes are rounded under the stored numbers (and under the next larger scale, if that is better), d and dmin are
   fitted to the result, and the integers chosen anew.

Sub-blocks are vector lanes: sub-block u of the tile's superblock s is lane u * (superblocks in a tile) + s. Every sum
runs down one lane, or over one superblock's lanes, in a fixed order: a superblock's bytes depend on nothing but its own
values and importances. Arrays of a tile are flat, element j of a lane at j * LANES + lane: with a constant stride LLVM
addresses them from one register and the inner loop runs at the speed of its arithmetic. All kernels that call one
another are in this module, because numba's cache of a kernel looks for changes in the kernel's own file only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from converters.quantize.rtn_search import LANES
from converters.quantize.tensor import F32, U8

Real = np.float32
SUPERBLOCK = 256
_ZERO, _ONE, _HALF, _TWO = np.float32(0), np.float32(1), np.float32(0.5), np.float32(2)
_TINY = np.float32(1e-20)  # of a superblock scaled to 1: far below what d can resolve
_SINGULAR = np.float32(1e-6)  # a determinant that is this small beside its terms is rounding noise: all codes are equal
_TOO_LARGE = np.float32(131072)  # is no fp16, and stays finite in what follows
# By more than rounding noise: where candidates are equally good, as in constant sub-blocks, all take the same one, and
# the superblock's scales are multiples of one number.
_MARGIN = np.float32(1 + 2e-6)
_SMALLEST = np.float32(2**-24)  # fp16 above 0
# Of the root mean square of a sub-block, what counts beside a value's magnitude in Q2_K. By ggml's weights, the
# magnitude alone, zeros may become anything, and an outlier among them is stored best as a minimum without a scale.
# ggml starts from codes that span the range and keeps them unless others are better; this little, which changes no
# dense tensor's error by those weights, leaves less error than that.
_SILENT = np.float32(0.05)
_PAIR_ROWS = 12  # of the work array of a search for d and dmin, before what these can be
_UNROLL = 8  # values of a lane that are summed in registers


# numba hands over its own objects, which have no types, and calls what comes back with float32: Any.
def _fma_code(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding, on every machine."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), codegen


def _rint_code(typing: Any, number: Any) -> Any:
    """The nearest integer, half to even, in one instruction."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [arguments[0].type]), arguments)

    return types.float32(types.float32), codegen


_fma = cast("Callable[[Any, Any, Any], Any]", intrinsic(_fma_code))
_rint = cast("Callable[[Any], Any]", intrinsic(_rint_code))


@njit(cache=True, nogil=True, error_model="numpy")
def search(
    blocks: F32, counts: F32, size: int, top: int, levels: int, ends: F32, steps: F32
) -> tuple[F32, U8, U8]:  # pragma: no cover
    """Factors f32[n, 2] (d, dmin), integers u8[n, 2, sub-blocks] (scales, minima) and codes u8[n, 256].

    blocks: f32[n, 256]; counts: f32[m, 256], block g has the importances counts[g % m], or none if m = 0.
    """
    n, subs = blocks.shape[0], SUPERBLOCK // size
    count = LANES // subs
    factors = np.empty((n, 2), np.float32)
    integers = np.empty((n, 2, subs), np.uint8)
    codes = np.empty((n, SUPERBLOCK), np.uint8)
    x, w = np.zeros(size * LANES, np.float32), np.zeros(size * LANES, np.float32)
    tile_codes = np.empty(size * LANES, np.uint8)
    exponents = np.empty(count, np.float32)
    found = np.zeros((4, LANES), np.float32)
    for start in range(0, n, count):
        stop = min(start + count, n)
        if stop - start < count:  # what a tile before this one left is not to be searched again
            x[:], w[:] = 0, 0
        _load(blocks, start, stop, size, x)
        _scale_tile(x, subs, exponents)
        if counts.shape[0]:
            _load(counts, start, stop, size, w)
        _weigh(x, subs, counts.shape[0] > 0, w)
        _search_tile(x, w, exponents, subs, top, levels, ends, steps, found)
        _round_codes(x, top, found, tile_codes)
        for block in range(stop - start):
            factors[start + block, 0] = found[0, block] * exponents[block]
            factors[start + block, 1] = found[1, block] * exponents[block]
            for sub in range(subs):
                lane = sub * count + block
                integers[start + block, 0, sub] = np.uint8(found[2, lane])
                integers[start + block, 1, sub] = np.uint8(found[3, lane])
                for j in range(size):
                    codes[start + block, sub * size + j] = tile_codes[j * LANES + lane]
    return factors, integers, codes


@njit(cache=True, nogil=True, error_model="numpy")
def _load(blocks: F32, start: int, stop: int, size: int, out: F32) -> None:  # pragma: no cover
    """Blocks [start, stop) f32[256], numbered modulo how many there are, into the first superblocks of a tile."""
    subs = SUPERBLOCK // size
    count = LANES // subs
    for block in range(stop - start):
        source = blocks[(start + block) % blocks.shape[0]]
        for sub in range(subs):
            for j in range(size):
                out[j * LANES + sub * count + block] = source[sub * size + j]


@njit(cache=True, nogil=True, error_model="numpy")
def _weigh(x: F32, subs: int, counted: bool, w: F32) -> None:  # pragma: no cover
    """w f32[size * LANES]: the weight of each value of x; if counted, w has the importances before."""
    size, count = x.shape[0] // LANES, LANES // subs
    base = np.zeros(LANES, np.float32)
    for start in range(0, x.shape[0], LANES):
        xs = x[start : start + LANES]
        for lane in range(LANES):
            base[lane] += xs[lane] * xs[lane]
    if counted:
        _fold(base, count)
        for lane in range(count):
            base[lane] *= np.float32((1 if size == 16 else 2) / SUPERBLOCK)
        for lane in range(count, LANES):
            base[lane] = base[lane - count]
    else:
        for lane in range(LANES):
            base[lane] = (_SILENT if size == 16 else _ONE) * np.sqrt(base[lane] / np.float32(size))
    for start in range(0, x.shape[0], LANES):
        xs, ws = x[start : start + LANES], w[start : start + LANES]
        if counted:
            for lane in range(LANES):
                ws[lane] *= np.sqrt(base[lane] + xs[lane] * xs[lane])
        else:
            for lane in range(LANES):
                ws[lane] = base[lane] + abs(xs[lane])


@njit(cache=True, nogil=True, error_model="numpy")
def _search_tile(
    x: F32, w: F32, exponents: F32, subs: int, top: int, levels: int, ends: F32, steps: F32, out: F32
) -> None:  # pragma: no cover
    """The numbers of the superblocks of a tile.

    x, w: f32[size * LANES], values and weights; exponents: f32[superblocks], the power of two that x was divided by
    top, levels: the largest code, and the largest integer scale or minimum
    ends: f32[candidates, 2], how far the range reaches below code 0 and above code top
    steps: f32[n], d and dmin are tried at the largest scale (minimum) over levels + step
    out: f32[4, LANES]: d and dmin of each lane's superblock in units of its exponent; integer scale and minimum
    """
    fixed = np.empty((2, LANES), np.float32)
    grid = np.empty((2, LANES), np.float32)
    sums = np.empty((3, LANES), np.float32)
    best = np.empty((3, LANES), np.float32)
    form = np.empty((7, LANES), np.float32)
    high = np.float32(top)
    most = np.float32(levels)
    _search_sub_blocks(x, w, high, ends, fixed, grid, sums, best)
    _set_grid(best[0], best[1], grid)
    _affine_sums(x, w, grid[0], grid[1], high, sums[0], sums[1], sums[2])
    _set_form(fixed, sums, form)
    _search_factors(best, form, exponents, subs, most, steps, out)
    _choose_integers(form, most, out)
    _set_stored_grid(out, grid)
    _affine_sums(x, w, grid[0], grid[1], high, sums[0], sums[1], sums[2])
    _try_larger_scales(x, w, high, most, fixed, grid, sums, out)
    _set_form(fixed, sums, form)
    _refit_factors(fixed, sums, exponents, subs, out)
    _choose_integers(form, most, out)


@njit(cache=True, nogil=True, error_model="numpy")
def _affine_sums(
    x: F32, w: F32, inverse: F32, offset: F32, top: Real, codes: F32, squares: F32, products: F32
) -> None:  # pragma: no cover
    """Sums of w u, w u u and w u x over each lane, f32[LANES], with u = clamp(round(x * inverse + offset), 0, top)."""
    codes[:], squares[:], products[:] = _ZERO, _ZERO, _ZERO
    for start in range(0, x.shape[0], _UNROLL * LANES):
        xs, ws = x[start : start + _UNROLL * LANES], w[start : start + _UNROLL * LANES]
        for lane in range(LANES):
            a, b, c = codes[lane], squares[lane], products[lane]
            for j in range(_UNROLL):
                value = xs[j * LANES + lane]
                u = min(max(_rint(_fma(value, inverse[lane], offset[lane])), _ZERO), top)
                wu = ws[j * LANES + lane] * u
                a += wu
                b = _fma(wu, u, b)
                c = _fma(wu, value, c)
            codes[lane], squares[lane], products[lane] = a, b, c


@njit(cache=True, nogil=True, error_model="numpy")
def _search_sub_blocks(
    x: F32, w: F32, top: Real, ends: F32, fixed: F32, grid: F32, sums: F32, best: F32
) -> None:  # pragma: no cover
    """best f32[3, LANES]: scale, minimum (what is subtracted, >= 0), gain; fixed f32[2, LANES]: sums of w and w x."""
    weight, first = fixed[0], fixed[1]
    low, span = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    _fixed_sums(x, w, low, span, weight, first)
    best[0], best[1], best[2] = _ZERO, _ZERO, np.float32(-np.inf)
    for candidate in range(ends.shape[0]):
        below, width = ends[candidate, 0], top + ends[candidate, 0] + ends[candidate, 1]
        for lane in range(LANES):
            inverse = width / max(span[lane], _TINY)
            grid[0, lane] = inverse
            grid[1, lane] = -low[lane] * inverse - below
        _affine_sums(x, w, grid[0], grid[1], top, sums[0], sums[1], sums[2])
        for lane in range(LANES):
            scale, minimum, gain = _solve(weight[lane], first[lane], sums[0, lane], sums[1, lane], sums[2, lane])
            better = gain > best[2, lane] * _MARGIN
            best[0, lane] = scale if better else best[0, lane]
            best[1, lane] = minimum if better else best[1, lane]
            best[2, lane] = gain if better else best[2, lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _fixed_sums(x: F32, w: F32, low: F32, span: F32, weight: F32, first: F32) -> None:  # pragma: no cover
    """Each lane's range, which includes 0 at the low end, and its sums of w and w x."""
    for lane in range(LANES):
        low[lane], span[lane], weight[lane], first[lane] = _ZERO, x[lane], _ZERO, _ZERO
    for start in range(0, x.shape[0], _UNROLL * LANES):
        xs, ws = x[start : start + _UNROLL * LANES], w[start : start + _UNROLL * LANES]
        for lane in range(LANES):
            least, most, a, b = low[lane], span[lane], weight[lane], first[lane]
            for j in range(_UNROLL):
                value, counted = xs[j * LANES + lane], ws[j * LANES + lane]
                least, most = min(least, value), max(most, value)
                a += counted
                b = _fma(counted, value, b)
            low[lane], span[lane], weight[lane], first[lane] = least, most, a, b
    for lane in range(LANES):
        span[lane] -= low[lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _solve(
    weight: Real, first: Real, codes: Real, squares: Real, products: Real
) -> tuple[Real, Real, Real]:  # pragma: no cover
    """Best scale and minimum >= 0 for given codes, and how much error they save beside the best constant."""
    determinant = weight * squares - codes * codes
    covariance = weight * products - first * codes
    regular = determinant > _SINGULAR * weight * squares
    scale = max(covariance, _ZERO) / (determinant if regular else _ONE)
    scale = scale if regular else _ZERO
    divisor = weight if weight > _ZERO else _ONE
    minimum = (scale * codes - first) / divisor
    alone = max(products, _ZERO) / (squares if squares > _ZERO else _ONE)  # with no minimum
    negative = minimum < _ZERO
    gain = alone * products - first * first / divisor if negative else covariance * scale / divisor
    return (alone if negative else scale), (_ZERO if negative else minimum), gain


@njit(cache=True, nogil=True, error_model="numpy")
def _set_grid(scale: F32, minimum: F32, grid: F32) -> None:  # pragma: no cover
    """The grid f32[2, LANES] that rounds to codes under scale and minimum f32[LANES]; a zero scale has code 0 only."""
    for lane in range(LANES):
        inverse = _ONE / max(scale[lane], _TINY)
        grid[0, lane] = inverse if scale[lane] > _TINY else _ZERO
        grid[1, lane] = minimum[lane] * grid[0, lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _round_codes(x: F32, top: int, out: F32, codes: U8) -> None:  # pragma: no cover
    """codes u8[size * LANES]: the nearest under the stored numbers out f32[4, LANES]."""
    grid = np.empty((2, LANES), np.float32)
    _set_stored_grid(out, grid)
    high = np.float32(top)
    for start in range(0, x.shape[0], LANES):
        xs, us = x[start : start + LANES], codes[start : start + LANES]
        for lane in range(LANES):
            u = min(max(_rint(_fma(xs[lane], grid[0, lane], grid[1, lane])), _ZERO), high)
            us[lane] = np.uint8(np.int32(u))


@njit(cache=True, nogil=True, error_model="numpy")
def _set_stored_grid(out: F32, grid: F32) -> None:  # pragma: no cover
    """The grid under the stored numbers out f32[4, LANES]."""
    for lane in range(LANES):
        scale = out[0, lane] * out[2, lane]
        inverse = _ONE / max(scale, _TINY)
        grid[0, lane] = inverse if scale > _TINY else _ZERO
        grid[1, lane] = out[1, lane] * out[3, lane] * grid[0, lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _set_form(fixed: F32, sums: F32, form: F32) -> None:  # pragma: no cover
    """A sub-block's error for fixed codes, up to a constant: a s s - 2 b s m + c m m.

    s and m count from the best scale and the best minimum (which may be negative). form f32[7, LANES]: these two; a, b,
    c; b / c, by which the best minimum grows with the scale; the best scale where the minimum is >= 0.
    """
    for lane in range(LANES):
        weight, first = fixed[0, lane], fixed[1, lane]
        codes, squares, products = sums[0, lane], sums[1, lane], sums[2, lane]
        determinant = weight * squares - codes * codes
        regular = determinant > _SINGULAR * weight * squares
        scale = (weight * products - first * codes) / (determinant if regular else _ONE)
        alone = products / (squares if squares > _ZERO else _ONE)
        scale = scale if regular else alone
        divisor = weight if weight > _ZERO else _ONE
        minimum = (scale * codes - first) / divisor
        form[0, lane], form[1, lane] = scale, minimum
        form[2, lane], form[3, lane], form[4, lane] = squares, codes, weight
        form[5, lane] = codes / divisor
        form[6, lane] = alone if minimum < _ZERO else scale


@njit(cache=True, nogil=True, error_model="numpy")
def _search_factors(
    best: F32, form: F32, exponents: F32, subs: int, most: Real, steps: F32, out: F32
) -> None:  # pragma: no cover
    """out[0:2]: the d and dmin of least error, over all pairs of steps."""
    count, tries = LANES // subs, steps.shape[0]
    work = np.empty((_PAIR_ROWS + 2 * tries) * LANES, np.float32)
    for row in range(7):
        for lane in range(LANES):
            work[row * LANES + lane] = form[row, lane]
    _spread_factors(best[0], exponents, subs, most, steps, work[_PAIR_ROWS * LANES :])
    _spread_factors(best[1], exponents, subs, most, steps, work[(_PAIR_ROWS + tries) * LANES :])
    error = _row(work, 11)
    least, pair = np.full(count, np.inf, np.float32), np.empty((2, count), np.int64)
    pair[0], pair[1] = _PAIR_ROWS, _PAIR_ROWS + tries
    for a in range(_PAIR_ROWS, _PAIR_ROWS + tries):
        _straddle(work, a, most)
        for b in range(_PAIR_ROWS + tries, _PAIR_ROWS + 2 * tries):
            _least_errors(work, b, most)
            _fold(error, count)
            for block in range(count):
                if error[block] < least[block]:
                    least[block], pair[0, block], pair[1, block] = error[block], a, b
    for factor in range(2):
        for lane in range(LANES):
            out[factor, lane] = work[pair[factor, lane % count] * LANES + lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _row(work: F32, row: int) -> F32:  # pragma: no cover
    """Row of a flat array of rows f32[LANES].

    LLVM knows that rows of one array do not overlap; where it would have to check more than a few pairs of arrays for
    that, it gives up on vector code.
    """
    return work[row * LANES : (row + 1) * LANES]


@njit(cache=True, nogil=True, error_model="numpy")
def _spread_factors(
    numbers: F32, exponents: F32, subs: int, most: Real, steps: F32, out: F32
) -> None:  # pragma: no cover
    """out f32[steps * LANES]: what d (or dmin) can be, of fp16 precision, given the real scales (minima) f32[LANES]."""
    count = LANES // subs
    for block in range(count):
        largest = _ZERO
        for lane in range(block, LANES, count):
            largest = max(largest, numbers[lane])
        for step in range(steps.shape[0]):
            unit = _round_to_half(largest / (most + steps[step]), exponents[block])
            for lane in range(block, LANES, count):
                out[step * LANES + lane] = unit


@njit(cache=True, nogil=True, error_model="numpy")
def _straddle(work: F32, unit_row: int, most: Real) -> None:  # pragma: no cover
    """Rows 7-10 of work: how far the integers around the best scale are off it, and where the minimum is best then.

    Rows 0-6: see _set_form; unit_row: where d is.
    """
    scale, minimum, slope, d = _row(work, 0), _row(work, 1), _row(work, 5), _row(work, unit_row)
    possible = _row(work, 6)
    off0, off1, middle0, middle1 = _row(work, 7), _row(work, 8), _row(work, 9), _row(work, 10)
    for lane in range(LANES):
        lower = _lower_integer(possible[lane], d[lane], most)
        s0, s1 = lower * d[lane] - scale[lane], min(lower + _ONE, most) * d[lane] - scale[lane]
        off0[lane], off1[lane] = s0, s1
        middle0[lane], middle1[lane] = minimum[lane] + slope[lane] * s0, minimum[lane] + slope[lane] * s1


@njit(cache=True, nogil=True, error_model="numpy")
def _least_errors(work: F32, unit_row: int, most: Real) -> None:  # pragma: no cover
    """Row 11 of work: the error of the better of the two scales; unit_row: where dmin is."""
    minimum, aa, bb, cc, dmin = _row(work, 1), _row(work, 2), _row(work, 3), _row(work, 4), _row(work, unit_row)
    off0, off1, middle0, middle1 = _row(work, 7), _row(work, 8), _row(work, 9), _row(work, 10)
    error = _row(work, 11)
    for lane in range(LANES):
        inverse = _inverse(dmin[lane])
        m0 = _nearest(middle0[lane] * inverse, most) * dmin[lane] - minimum[lane]
        m1 = _nearest(middle1[lane] * inverse, most) * dmin[lane] - minimum[lane]
        e0 = _error(aa[lane], bb[lane], cc[lane], off0[lane], m0)
        e1 = _error(aa[lane], bb[lane], cc[lane], off1[lane], m1)
        error[lane] = min(e0, e1)


@njit(cache=True, nogil=True, error_model="numpy")
def _round_to_half(value: Real, exponent: Real) -> Real:  # pragma: no cover
    """value >= 0, rounded so that value * exponent (a power of two) is an fp16, which is 0 for 0 alone.

    More than _TOO_LARGE is cut off.
    """
    real = min(value * exponent, _TOO_LARGE)
    # Veltkamp's split keeps 11 bits. Below 2**-14 the grid is that of subnormals, 2**-24, as is a float's near 0.75.
    high = real * np.float32(8193)
    normal = high - (high - real)
    subnormal = max((real + np.float32(0.75)) - np.float32(0.75), _SMALLEST)
    half = subnormal if real < np.float32(2**-14) else normal
    return half / exponent if real > _ZERO else _ZERO


@njit(cache=True, nogil=True, error_model="numpy")
def _lower_integer(scale: Real, unit: Real, most: Real) -> Real:  # pragma: no cover
    """The integer at or below scale / unit, 0 ... most."""
    return _nearest(scale * _inverse(unit) - _HALF, most)


@njit(cache=True, nogil=True, error_model="numpy")
def _error(a: Real, b: Real, c: Real, s: Real, m: Real) -> Real:  # pragma: no cover
    return s * (a * s - _TWO * b * m) + c * m * m


@njit(cache=True, nogil=True, error_model="numpy")
def _fold(error: F32, count: int) -> None:  # pragma: no cover
    """Sum the lanes of each superblock into error[:count], the first half of its sub-blocks with the second first."""
    half = LANES // 2
    while half >= count:
        for lane in range(half):
            error[lane] += error[half + lane]
        half //= 2


@njit(cache=True, nogil=True, error_model="numpy")
def _inverse(unit: Real) -> Real:  # pragma: no cover
    """1 / unit, or 0 of nothing."""
    return _ONE / (unit if unit > _ZERO else np.float32(np.inf))


@njit(cache=True, nogil=True, error_model="numpy")
def _nearest(number: Real, most: Real) -> Real:  # pragma: no cover
    return min(max(_rint(number), _ZERO), most)


@njit(cache=True, nogil=True, error_model="numpy")
def _choose_integers(form: F32, most: Real, out: F32) -> None:  # pragma: no cover
    """Integer scales and minima out[2:4] of least error under the factors out[0:2]."""
    for lane in range(LANES):
        d, dmin = out[0, lane], out[1, lane]
        inverse = _inverse(dmin)
        lower = _lower_integer(form[6, lane], d, most)
        upper = min(lower + _ONE, most)
        s0, s1 = lower * d - form[0, lane], upper * d - form[0, lane]
        n0 = _nearest((form[1, lane] + form[5, lane] * s0) * inverse, most)
        n1 = _nearest((form[1, lane] + form[5, lane] * s1) * inverse, most)
        e0 = _error(form[2, lane], form[3, lane], form[4, lane], s0, n0 * dmin - form[1, lane])
        e1 = _error(form[2, lane], form[3, lane], form[4, lane], s1, n1 * dmin - form[1, lane])
        out[2, lane] = lower if e0 <= e1 else upper
        out[3, lane] = n0 if e0 <= e1 else n1


@njit(cache=True, nogil=True, error_model="numpy")
def _try_larger_scales(
    x: F32, w: F32, top: Real, most: Real, fixed: F32, grid: F32, sums: F32, out: F32
) -> None:  # pragma: no cover
    """Take the next integer scale where it is better once codes are rounded anew.

    With codes fixed, as in _choose_integers, the step from integer 0 to 1 looks worse than it is: beside an outlier's
    sub-block, others would lose all they have.
    """
    trial, new = out.copy(), np.empty((3, LANES), np.float32)
    for lane in range(LANES):
        trial[2, lane] = min(out[2, lane] + _ONE, most)
    _set_stored_grid(trial, grid)
    _affine_sums(x, w, grid[0], grid[1], top, new[0], new[1], new[2])
    for lane in range(LANES):
        d, minimum = out[0, lane], out[1, lane] * out[3, lane]
        s0, s1 = d * out[2, lane], d * trial[2, lane]
        # Without the parts that both have.
        e0 = s0 * (sums[1, lane] * s0 - _TWO * (sums[0, lane] * minimum + sums[2, lane]))
        e1 = s1 * (new[1, lane] * s1 - _TWO * (new[0, lane] * minimum + new[2, lane]))
        better = e1 < e0
        out[2, lane] = trial[2, lane] if better else out[2, lane]
        for row in range(3):
            sums[row, lane] = new[row, lane] if better else sums[row, lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _refit_factors(fixed: F32, sums: F32, exponents: F32, subs: int, out: F32) -> None:  # pragma: no cover
    """d and dmin of each superblock by least squares over all its values, codes and integers fixed."""
    count = LANES // subs
    work = np.empty(5 * LANES, np.float32)
    aa, bb, cc, pp, qq = _row(work, 0), _row(work, 1), _row(work, 2), _row(work, 3), _row(work, 4)
    for lane in range(LANES):
        scale, minimum = out[2, lane], out[3, lane]
        aa[lane] = sums[1, lane] * scale * scale
        bb[lane] = sums[0, lane] * scale * minimum
        cc[lane] = fixed[0, lane] * minimum * minimum
        pp[lane] = sums[2, lane] * scale
        qq[lane] = fixed[1, lane] * minimum
    for row in range(5):
        _fold(_row(work, row), count)
    for block in range(count):
        a, b, c, p, q = aa[block], bb[block], cc[block], pp[block], qq[block]
        determinant = a * c - b * b
        d, dmin = out[0, block], out[1, block]
        if determinant > _SINGULAR * a * c:
            d = _round_to_half(max((c * p - b * q) / determinant, _ZERO), exponents[block])
            dmin = _round_to_half(max((b * d - q) / c, _ZERO), exponents[block])
        elif c > _ZERO:
            dmin = _round_to_half(max((b * d - q) / c, _ZERO), exponents[block])
        elif a > _ZERO:
            d = _round_to_half(max(p / a, _ZERO), exponents[block])
        for sub in range(subs):
            out[0, sub * count + block], out[1, sub * count + block] = d, dmin


@njit(cache=True, nogil=True, error_model="numpy")
def _scale_tile(x: F32, subs: int, exponents: F32) -> None:  # pragma: no cover
    """Divide each superblock of x by a power of two, exponents f32[superblocks], that brings its largest near 1."""
    count = LANES // subs
    largest = np.zeros(LANES, np.float32)
    for start in range(0, x.shape[0], _UNROLL * LANES):
        xs = x[start : start + _UNROLL * LANES]
        for lane in range(LANES):
            magnitude = largest[lane]
            for j in range(_UNROLL):
                magnitude = max(magnitude, abs(xs[j * LANES + lane]))
            largest[lane] = magnitude
    inverse = np.empty(LANES, np.float32)
    for block in range(count):
        magnitude = _ZERO
        for sub in range(subs):
            magnitude = max(magnitude, largest[sub * count + block])
        # Less than 2**-30 is zero in fp16 whatever the codes; 2**128 is no float32.
        power = min(max(math.frexp(magnitude)[1], -30), 127)
        exponents[block] = np.float32(math.ldexp(1.0, power))
        for sub in range(subs):
            inverse[sub * count + block] = np.float32(math.ldexp(1.0, -power))
    for start in range(0, x.shape[0], _UNROLL * LANES):
        xs = x[start : start + _UNROLL * LANES]
        for lane in range(LANES):
            for j in range(_UNROLL):
                xs[j * LANES + lane] *= inverse[lane]
