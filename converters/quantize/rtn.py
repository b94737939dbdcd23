"""Round to nearest with scales by least squares.

A group's scale is searched over candidates around the one that maps the extreme value to the end of the range. Each
candidate rounds the group to integers u = code - zero; the best scale for these is <w, u> / <u, u>, which leaves the
squared error <w, w> - <w, u>^2 / <u, u>, so the candidate with the largest <w, u>^2 / <u, u> wins. The candidates are
coarse steps of the range's end, then finer ones around the best. The scale is refitted to its own codes, stored in
fp16, and the codes are rounded against the stored scale.

The products are weighted by the importance of each input column where one is given: with the column's mean square, the
error that counts is that of the layer's output (as if inputs were uncorrelated), not of the weights.

Groups are laid out as vector lanes (see lanes.py): the result does not depend on vector width, thread count or how a
matrix is cut into blocks of rows. The kernels run on the calling thread without the GIL; the pour's threads are what
makes them parallel.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from converters.quantize.lanes import LANES, try_scale, try_scale_weighted
from converters.quantize.scheme import Scheme
from converters.quantize.tensor import F16, F32, U8, QuantTensor

# 1.5 * 2**23: adding and subtracting it rounds a float32 below 2**22 to an integer, half to even.
_ROUND = np.float32(12582912.0)
_TINY = np.float32(1e-30)  # far below what an fp16 scale can hold; the inverse of less overflows float32
_INT4_END = np.arange(-1.2, 2.1, 0.4)  # on 8: where the extreme value lands
_INT4_PLAIN = 7  # of these are worth trying where all columns count the same: clipping more of the range never wins
_INT4_FINE = np.array([0.975, 0.9875, 1.0125, 1.025], np.float32)  # factors on the best of them
_INT8_END = np.arange(-2, 2.1, 1)  # on 127
_INT8_FINE = np.array([0.996, 1.004], np.float32)
# Factors on the scale that spans an asymmetric group's range.
_SPANS = np.arange(70, 106, 3, dtype=np.float32) / 100


def quantize_rtn(weight: F32, scheme: Scheme, importance: F32 | None = None) -> QuantTensor:
    """Quantize rows f32[out, in] of a matrix; `in` must be a multiple of the scheme's group size.

    importance: f32[in], positive: how much an error in each column counts. None: all the same.
    OverflowError if a scale does not fit fp16.
    """
    rows, width = weight.shape
    group = scheme.group_size_for(width)
    assert scheme.is_integer and width % group == 0, (scheme.name, weight.shape)
    groups = np.ascontiguousarray(weight).reshape(rows, -1, group)
    counts = None if importance is None else np.ascontiguousarray(importance, np.float32).reshape(-1, group)
    low = 1 if scheme.symmetric and scheme.bits == 8 else 0  # -128 is left out, as in Q8_0
    top = (1 << scheme.bits) - 1
    if scheme.symmetric:
        middle = 1 << (scheme.bits - 1)
        steps, fine = _steps(scheme.bits, weighted=counts is not None)
        scale = _search_symmetric(groups, counts, steps, fine, low - middle, top - middle)
        stored, zero = _as_fp16(scale), np.broadcast_to(np.uint8(middle), scale.shape)
    else:
        scale, zero = _search_asymmetric(groups, counts, _SPANS, top)
        stored = _as_fp16(_round_significand(scale))
    codes = _round_codes(groups, stored.astype(np.float32), zero, low, top)
    return QuantTensor(codes.reshape(rows, width), stored, None if scheme.symmetric else zero, scheme.bits)


def _steps(bits: int, weighted: bool) -> tuple[F32, F32]:
    """Where the extreme value may land, f32[candidates], and factors on the best of these, f32[n]."""
    if bits == 8:
        return (127 + _INT8_END).astype(np.float32), _INT8_FINE
    end = 8 + (_INT4_END if weighted else _INT4_END[:_INT4_PLAIN])
    # -8 is further out than +7: mapping the extreme value to the far or the near end are different candidates.
    return np.concatenate([-end, end - 1]).astype(np.float32), _INT4_FINE


def _as_fp16(scale: F32) -> F16:
    with np.errstate(over="ignore"):
        stored = scale.astype(np.float16)
    if not np.isfinite(stored).all():
        raise OverflowError(f"a scale of {np.abs(scale).max():.3g} does not fit fp16")
    return stored


def _round_significand(scale: F32) -> F32:
    """Round to 7 significant bits, on fp16's subnormal grid below: then scale * zero, zero < 16, is exact in fp16."""
    mantissa, exponent = np.frexp(scale)
    rounded: F32 = np.ldexp(np.rint(mantissa * 128) / 128, exponent).astype(np.float32)
    return rounded


# A kernel's arrays: groups f32[rows, m, size]; counts f32[m, size] or None. Lanes are LANES rows' groups in the same
# columns, x f32[size, LANES]. `best` is f32[3, LANES]: the gain <w, u>^2 / <u, u>, the scale, and the candidate.


@njit(cache=True, nogil=True, error_model="numpy")
def _search_symmetric(
    groups: F32, counts: F32 | None, steps: F32, fine: F32, low: int, high: int
) -> F32:  # pragma: no cover
    """Signed scales f32[rows, m]. The extreme value may land on either end of the range."""
    rows, m, size = groups.shape
    scale = np.empty((rows, m), np.float32)
    x, best = np.empty((size, LANES), np.float32), np.empty((3, LANES), np.float32)
    least, most = np.full(LANES, low, np.float32), np.full(LANES, high, np.float32)
    landing, inverse = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    tried, coarse = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for start in range(0, rows, LANES):
        for column in range(m):
            _load(groups, start, column, x)
            _inverse_of_extreme(x, landing)
            best[0] = -1
            best[1:] = 0
            for candidate in steps:
                for lane in range(LANES):
                    tried[lane] = candidate
                    inverse[lane] = candidate * landing[lane]
                _try(x, counts, column, inverse, least, most, tried, best)
            coarse[:] = best[2]
            for factor in fine:
                for lane in range(LANES):
                    inverse[lane] = coarse[lane] * factor * landing[lane]
                _try(x, counts, column, inverse, least, most, tried, best)
            _refit(x, counts, column, inverse, least, most, best)
            for lane in range(min(LANES, rows - start)):
                scale[start + lane, column] = best[1, lane]
    return scale


@njit(cache=True, nogil=True, error_model="numpy")
def _search_asymmetric(groups: F32, counts: F32 | None, spans: F32, top: int) -> tuple[F32, U8]:  # pragma: no cover
    """Positive scales f32[rows, m] and integer zeros u8[rows, m]."""
    rows, m, size = groups.shape
    scale, zeros = np.empty((rows, m), np.float32), np.empty((rows, m), np.uint8)
    x, best = np.empty((size, LANES), np.float32), np.empty((3, LANES), np.float32)
    least, most = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    lowest, highest = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    zero, inverse = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    end, half = np.float32(top), np.float32(0.5)  # a literal would make it double arithmetic
    for start in range(0, rows, LANES):
        for column in range(m):
            _load(groups, start, column, x)
            _range(x, lowest, highest)
            best[0] = -1
            best[1:] = 0
            for span in spans:
                # The zero that keeps the middle of the range in the middle of the codes, and its two neighbours.
                for offset in (np.float32(-1), np.float32(0), np.float32(1)):
                    for lane in range(LANES):
                        width = (highest[lane] - lowest[lane]) * (span / end)
                        inverse[lane] = np.float32(1) / width if width > _TINY else np.float32(0)
                        middle = half * end - half * (highest[lane] + lowest[lane]) * inverse[lane]
                        zero[lane] = min(max((middle + _ROUND) - _ROUND + offset, np.float32(0)), end)
                        least[lane] = -zero[lane]
                        most[lane] = end - zero[lane]
                    _try(x, counts, column, inverse, least, most, zero, best)
            for lane in range(LANES):
                least[lane] = -best[2, lane]
                most[lane] = end - best[2, lane]
            _refit(x, counts, column, inverse, least, most, best)
            for lane in range(min(LANES, rows - start)):
                scale[start + lane, column] = best[1, lane]
                zeros[start + lane, column] = np.uint8(best[2, lane])
    return scale, zeros


@njit(cache=True, nogil=True)
def _load(groups: F32, start: int, column: int, x: F32) -> None:  # pragma: no cover
    """Fill the lanes from row `start` on; lanes without a row get zeros.

    Eight rows at a time: rows are often a power of two apart, where more of them evict one another from the cache.
    """
    lanes = min(LANES, len(groups) - start)
    if lanes < LANES:
        x[:] = 0
    whole = lanes - lanes % 8
    for first in range(0, whole, 8):
        for j in range(len(x)):
            for lane in range(8):
                x[j, first + lane] = groups[start + first + lane, column, j]
    for lane in range(whole, lanes):
        for j in range(len(x)):
            x[j, lane] = groups[start + lane, column, j]


@njit(cache=True, nogil=True)
def _try(
    x: F32, counts: F32 | None, column: int, inverse: F32, least: F32, most: F32, tried: F32, best: F32
) -> None:  # pragma: no cover
    """Keep an inverse scale of each lane where it is the best so far."""
    if counts is None:
        try_scale(len(x), x, inverse, least, most, tried, best)
    else:
        try_scale_weighted(len(x), x, counts[column], inverse, least, most, tried, best)


@njit(cache=True, nogil=True, error_model="numpy")
def _refit(
    x: F32, counts: F32 | None, column: int, inverse: F32, least: F32, most: F32, best: F32
) -> None:  # pragma: no cover
    """The least-squares scale gives other codes, whose scale may be better again."""
    for lane in range(LANES):
        inverse[lane] = np.float32(1) / best[1, lane] if best[1, lane] != 0 else np.float32(0)
    _try(x, counts, column, inverse, least, most, best[2], best)


@njit(cache=True, nogil=True, error_model="numpy")
def _inverse_of_extreme(values: F32, landing: F32) -> None:  # pragma: no cover
    """1 / the value farthest from zero of each lane of f32[size, LANES], with its sign; 0 where all are (nearly) 0."""
    landing[:] = 0
    for j in range(len(values)):
        for lane in range(LANES):
            landing[lane] = values[j, lane] if abs(values[j, lane]) > abs(landing[lane]) else landing[lane]
    for lane in range(LANES):
        landing[lane] = np.float32(1) / landing[lane] if abs(landing[lane]) > _TINY else np.float32(0)


@njit(cache=True, nogil=True)
def _range(values: F32, lowest: F32, highest: F32) -> None:  # pragma: no cover
    """The range of each lane of f32[size, LANES], widened to include 0."""
    lowest[:] = 0
    highest[:] = 0
    for j in range(len(values)):
        for lane in range(LANES):
            lowest[lane] = min(lowest[lane], values[j, lane])
            highest[lane] = max(highest[lane], values[j, lane])


@njit(cache=True, nogil=True, error_model="numpy")
def _round_codes(groups: F32, scale: F32, zero: U8, low: int, top: int) -> U8:  # pragma: no cover
    """u8[rows, m, size]: the nearest code for each value under the stored scale and zero, [rows, m]."""
    rows, m, size = groups.shape
    codes = np.empty((rows, m, size), np.uint8)
    least, most = np.float32(low), np.float32(top)
    for row in range(rows):
        for column in range(m):
            inverse = np.float32(1) / scale[row, column] if scale[row, column] != 0 else np.float32(0)
            shift = np.float32(zero[row, column])
            for j in range(size):
                code = (groups[row, column, j] * inverse + _ROUND) - _ROUND + shift
                codes[row, column, j] = np.uint8(np.int32(min(max(code, least), most)))
    return codes
