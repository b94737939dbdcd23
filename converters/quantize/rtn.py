"""Round to nearest with scales by least squares.

A group's scale is searched over candidates around the one that maps the extreme value to the end of the range. Each
candidate rounds the group to integers u = code - zero; the best scale for these is <w, u> / <u, u>, which leaves the
squared error <w, w> - <w, u>^2 / <u, u>, so the candidate with the largest <w, u>^2 / <u, u> wins. The scale is then
refitted to its own codes, stored in fp16, and the codes are rounded against the stored scale.

The products are weighted by the importance of each input column where one is given: with the column's mean square, the
error that counts is that of the layer's output (as if inputs were uncorrelated), not of the weights.

Groups are laid out as vector lanes: every sum runs over one lane in a fixed order, so the result does not depend on
vector width, thread count or how a matrix is cut into blocks of rows.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from converters.quantize.scheme import Scheme
from converters.quantize.tensor import F16, F32, U8, QuantTensor

# 1.5 * 2**23: adding and subtracting it rounds a float32 below 2**22 to an integer, half to even.
_ROUND = np.float32(12582912.0)
_LANES = 64
_TINY = 1e-30  # far below what an fp16 scale can hold; the inverse of less overflows float32
_REFITS = 2
# Steps of the integer end that the extreme value is mapped to: 8 + t for int4, 127 + t for int8.
_STEPS_4BIT = np.arange(-13, 14, dtype=np.float32) / 10
_STEPS_8BIT = np.arange(-4, 5, dtype=np.float32) / 2
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
    groups = weight.reshape(-1, group)
    counts = np.ones((1, group), np.float32) if importance is None else importance.reshape(-1, group)
    if scheme.symmetric:
        scale, zero = _search_symmetric(groups, counts, scheme.bits)
        stored = _as_fp16(scale)
    else:
        scale, zero = _search_asymmetric(groups, counts, scheme.bits)
        stored = _as_fp16(_round_significand(scale))
    low = 1 if scheme.symmetric and scheme.bits == 8 else 0  # -128 is left out, as in Q8_0
    codes = _round_codes(groups, stored.astype(np.float32), zero, low, (1 << scheme.bits) - 1)
    shape = rows, width // group
    return QuantTensor(
        codes.reshape(rows, width),
        stored.reshape(shape),
        None if scheme.symmetric else zero.reshape(shape),
        scheme.bits,
    )


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


def _search_symmetric(groups: F32, counts: F32, bits: int) -> tuple[F32, U8]:
    """Signed scales f32[groups] and the implied zeros. The extreme value may land on either end of the range."""
    end = np.float32(8 if bits == 4 else 127)
    steps = end + (_STEPS_4BIT if bits == 4 else _STEPS_8BIT)
    # -8 is further out than +7: mapping the extreme value to the far or the near end are different candidates.
    ends = np.concatenate([-steps, steps - 1]) if bits == 4 else steps
    extreme = groups[np.arange(len(groups)), np.abs(groups).argmax(axis=1)]
    inverse = np.zeros((len(ends), len(groups)), np.float32)
    np.divide(ends[:, None], extreme[None, :], out=inverse, where=np.abs(extreme)[None, :] > _TINY)
    zero = np.full(len(groups), 1 << (bits - 1), np.uint8)
    zeros = np.broadcast_to(zero, inverse.shape)
    scale, _ = _search(groups, counts, inverse, zeros, 1 if bits == 8 else 0, (1 << bits) - 1)
    return scale, zero


def _search_asymmetric(groups: F32, counts: F32, bits: int) -> tuple[F32, U8]:
    """Positive scales f32[groups] and integer zeros u8[groups]."""
    top = (1 << bits) - 1
    low, high = np.minimum(groups.min(axis=1), 0), np.maximum(groups.max(axis=1), 0)
    span = (high - low)[None, :] * (_SPANS / top)[:, None]
    inverse = np.zeros_like(span)
    np.divide(np.float32(1), span, out=inverse, where=span > _TINY)
    # The zero that keeps the middle of the range in the middle of the codes, and its two neighbours.
    middle = np.rint(np.float32(top / 2) - (high + low)[None, :] / 2 * inverse)
    zeros = np.concatenate([np.clip(middle + offset, 0, top) for offset in (-1, 0, 1)]).astype(np.uint8)
    return _search(groups, counts, np.concatenate([inverse] * 3), zeros, 0, top)


@njit(cache=True, parallel=True, nogil=True)
def _search(
    groups: F32, counts: F32, inverse: F32, zeros: U8, low: int, top: int
) -> tuple[F32, U8]:  # pragma: no cover
    """Best scale and zero of each group.

    groups f32[n, size]; counts f32[m, size], group g has the importances counts[g % m]; inverse f32[candidates, n] and
    zeros u8[candidates, n] are what to try.
    """
    n, size = groups.shape
    scale = np.zeros(n, np.float32)
    zero = np.zeros(n, np.uint8)
    for tile in prange((n + _LANES - 1) // _LANES):
        start = tile * _LANES
        lanes = min(_LANES, n - start)
        w = np.zeros((size, _LANES), np.float32)
        count = np.ones((size, _LANES), np.float32)
        for lane in range(lanes):
            row = (start + lane) % counts.shape[0]
            for j in range(size):
                w[j, lane] = groups[start + lane, j]
                count[j, lane] = counts[row, j]
        inv = np.zeros(_LANES, np.float32)
        least = np.zeros(_LANES, np.float32)
        most = np.zeros(_LANES, np.float32)
        num = np.zeros(_LANES, np.float32)
        den = np.zeros(_LANES, np.float32)
        best = np.full(_LANES, -1, np.float32)
        best_scale = np.zeros(_LANES, np.float32)
        best_zero = np.zeros(_LANES, np.uint8)
        for candidate in range(inverse.shape[0]):
            for lane in range(lanes):
                inv[lane] = inverse[candidate, start + lane]
                least[lane] = np.float32(low) - np.float32(zeros[candidate, start + lane])
                most[lane] = np.float32(top) - np.float32(zeros[candidate, start + lane])
            _fit(w, count, inv, least, most, num, den)
            for lane in range(lanes):
                gain = num[lane] * num[lane] / den[lane] if den[lane] > 0 else np.float32(0)
                if gain > best[lane]:
                    best[lane] = gain
                    best_scale[lane] = num[lane] / den[lane] if den[lane] > 0 else np.float32(0)
                    best_zero[lane] = zeros[candidate, start + lane]
        for lane in range(lanes):
            least[lane] = np.float32(low) - np.float32(best_zero[lane])
            most[lane] = np.float32(top) - np.float32(best_zero[lane])
        for _ in range(_REFITS):
            for lane in range(lanes):
                inv[lane] = np.float32(1) / best_scale[lane] if best_scale[lane] != 0 else np.float32(0)
            _fit(w, count, inv, least, most, num, den)
            for lane in range(lanes):
                if den[lane] > 0:
                    best_scale[lane] = num[lane] / den[lane]
        for lane in range(lanes):
            scale[start + lane] = best_scale[lane]
            zero[start + lane] = best_zero[lane]
    return scale, zero


@njit(cache=True, nogil=True)
def _fit(w: F32, count: F32, inv: F32, least: F32, most: F32, num: F32, den: F32) -> None:  # pragma: no cover
    """num = <w, u>, den = <u, u> of each lane, u = clamp(round(w * inv), least, most); w and count f32[size, lanes]."""
    for lane in range(_LANES):
        num[lane] = 0
        den[lane] = 0
    for j in range(w.shape[0]):
        for lane in range(_LANES):
            u = (w[j, lane] * inv[lane] + _ROUND) - _ROUND
            u = min(max(u, least[lane]), most[lane])
            counted = count[j, lane] * u
            num[lane] += w[j, lane] * counted
            den[lane] += u * counted


@njit(cache=True, parallel=True, nogil=True)
def _round_codes(groups: F32, scale: F32, zero: U8, low: int, top: int) -> U8:  # pragma: no cover
    """u8[n, size]: the nearest code for each value under the stored scale and zero."""
    n, size = groups.shape
    codes = np.empty((n, size), np.uint8)
    for group in prange(n):
        inverse = np.float32(1) / scale[group] if scale[group] != 0 else np.float32(0)
        shift = np.float32(zero[group])
        for j in range(size):
            code = (groups[group, j] * inverse + _ROUND) - _ROUND + shift
            codes[group, j] = np.uint8(min(max(code, np.float32(low)), np.float32(top)))
    return codes
