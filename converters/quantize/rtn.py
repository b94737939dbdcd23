"""Round to nearest with scales by least squares.

A group's scale is searched over candidates around the one that maps the extreme value to the end of the range. Each
candidate rounds the group to integers u = code - zero; the best scale for these is <w, u> / <u, u>, which leaves the
squared error <w, w> - <w, u>^2 / <u, u>, so the candidate with the largest <w, u>^2 / <u, u> wins. The candidates are
coarse steps of the range's end, then finer ones around the best. The scale is refitted to its own codes, stored in
fp16, and the codes are rounded against the stored scale. Where fp16 has few scales left, the next larger one is tried
as well.

The products are weighted by the importance of each input column where one is given: with the column's mean square, the
error that counts is that of the layer's output (as if inputs were uncorrelated), not of the weights.

Groups are laid out as vector lanes (see rtn_search.py): the result does not depend on vector width, thread count or how
a matrix is cut into blocks of rows. The kernels run on the calling thread without the GIL; the threads of the pour are
what makes them parallel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from converters.quantize.grid import IntegerGrid
from converters.quantize.half import scales_to_fp16
from converters.quantize.kernels import dequantize_codes
from converters.quantize.rtn_search import round_codes, search_asymmetric, search_symmetric
from converters.quantize.scheme import Scheme
from converters.quantize.tensor import F16, F32, U8, QuantTensor

_INT4_END = np.arange(-1.0, 2.1, 0.5)  # on 8: where the extreme value lands
_INT4_PLAIN = 5  # of these are tried where all columns count the same: clipping more of the range gains nothing
_INT4_FINE = np.array([0.97, 0.985, 1.015, 1.03], np.float32)  # factors on the best of them
_INT8_END = np.arange(-2, 2.1, 1)  # on 127
_INT8_FINE = np.array([0.996, 1.004], np.float32)
# Factors on the scale that spans an asymmetric group's range.
_SPANS = (np.arange(70, 106, 3) / 100).astype(np.float32)
# fp16 scales are 2**-24 apart below 2**-14. From here on they are so close that rounding one moves the end of 127 steps
# by less than half a step; below, the next larger one has 7 significant bits like any other.
_FAINT = np.float32(2**-17)


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
    stored, zero = choose_scales(groups, counts, scheme)
    grid = IntegerGrid.of(scheme)
    codes = round_codes(groups, stored.astype(np.float32), zero, grid.low, grid.top)
    return QuantTensor(codes.reshape(rows, width), stored, None if scheme.symmetric else zero, scheme.bits)


def choose_scales(groups: F32, counts: F32 | None, scheme: Scheme) -> tuple[F16, U8]:
    """Scales f16[rows, m] as they are stored and zeros u8[rows, m] for groups f32[rows, m, size].

    counts: f32[m, size], positive: how much an error in each column counts. OverflowError if a scale, or the product of
    scale and zero, does not fit fp16.
    """
    grid = IntegerGrid.of(scheme)
    if grid.middle is not None:
        steps, fine = _steps(scheme.bits, weighted=counts is not None)
        scale = search_symmetric(groups, counts, steps, fine, grid.low - grid.middle, grid.top - grid.middle)
        zero = np.broadcast_to(np.uint8(grid.middle), scale.shape)
        stored = scales_to_fp16(scale, None, groups)
    else:
        scale, zero = search_asymmetric(groups, counts, _SPANS, grid.top)
        scale = _round_significand(scale, grid.significant_bits)
        stored = scales_to_fp16(scale, zero, groups)
    faint = np.abs(scale) < _FAINT
    if faint.any():
        faint &= scale != 0
        weights = None if counts is None else np.broadcast_to(counts, groups.shape)[faint]
        stored[faint] = _enlarged(groups[faint], weights, stored[faint], zero[faint], grid)
    return stored, zero


def _enlarged(groups: F32, weights: F32 | None, stored: F16, zero: U8, grid: IntegerGrid) -> F16:
    """The next larger scales f16[n] where these leave less error than the stored ones, which may be 0 but have a sign;
    groups and weights f32[n, size]."""
    larger = np.nextafter(stored, np.copysign(np.float16(np.inf), stored))

    def error(tried: F16) -> NDArray[np.float64]:
        grids = tried.astype(np.float32)[:, None], zero[:, None]
        codes = round_codes(groups[:, None], *grids, grid.low, grid.top)
        squares = np.square(dequantize_codes(codes, *grids)[:, 0] - groups, dtype=np.float64)
        sums: NDArray[np.float64] = (squares if weights is None else squares * weights).sum(axis=1)
        return sums

    better: F16 = np.where(error(larger) < error(stored), larger, stored)
    return better


def _steps(bits: int, weighted: bool) -> tuple[F32, F32]:
    """Where the extreme value may land, f32[candidates], and factors on the best of these, f32[n]."""
    if bits == 8:
        return (127 + _INT8_END).astype(np.float32), _INT8_FINE
    end = _INT4_END if weighted else _INT4_END[:_INT4_PLAIN]
    # -8 is further out than +7: mapping the extreme value to the far or the near end are different candidates.
    return np.concatenate([-8 - end, 7 + end]).astype(np.float32), _INT4_FINE


def _round_significand(scale: F32, bits: int) -> F32:
    """Round to so many significant bits; fp16 then rounds to its subnormal grid what is below."""
    mantissa, exponent = np.frexp(scale)
    unit = 1 << bits
    rounded: F32 = np.ldexp(np.rint(mantissa * unit) / unit, exponent).astype(np.float32)
    return rounded
