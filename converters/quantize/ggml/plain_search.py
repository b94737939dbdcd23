"""Scales of ggml's plain types under an importance of the input columns.

The error of a value counts importance * sqrt(row's mean square + value^2): ggml's own weights where it has an
importance matrix. The search is that of rtn: every candidate rounds the block, the scale that fits these codes best
follows by weighted least squares, and the best of all is fitted to its own codes again. ggml tries 19 scales for a
symmetric block, and 37 for an affine one that all map the maximum to within a step of the top code; it refits neither.

Blocks lie in vector lanes and every sum runs down one lane in a fixed order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from converters.quantize.tensor import F32

BLOCK = 32
_LANES = 64
_REFITS = 3
_TERMS = 4  # values of a lane that are added up before the sums are stored
_TINY = 1e-30  # far below what an fp16 scale can hold; the inverse of less overflows float32
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds a float32 below 2**22, half to even
# Steps of the code that a block's extreme value, or its maximum, is mapped to.
_STEPS = np.arange(-9, 10, dtype=np.float32) / np.float32(10)
_NEAR_STEPS = np.arange(-8, 9, 2, dtype=np.float32) / np.float32(10)
_AFFINE_STEPS = np.arange(-30, 10, dtype=np.float32) / np.float32(10)


def search_symmetric(values: F32, importance: F32, half: int) -> F32:
    """Signed scales f32[blocks] for codes -half ... half - 1 of rows f32[n, in], importance f32[in]."""
    # The extreme value may land on the far or on the near end of the codes.
    ends = np.concatenate([-half - _STEPS, half - 1 + _NEAR_STEPS]).astype(np.float32)
    return _search_symmetric(values.reshape(-1, BLOCK), *_counts(values, importance), ends, half)


def search_affine(values: F32, importance: F32, top: int) -> tuple[F32, F32]:
    """Scales and minima f32[blocks] for codes 0 ... top of rows f32[n, in], importance f32[in]."""
    spans = np.float32(top) + _AFFINE_STEPS
    return _search_affine(values.reshape(-1, BLOCK), *_counts(values, importance), spans, top)


def refit_affine(values: F32, importance: F32, scale: F32, least: F32, top: int) -> F32:
    """Scales f32[blocks] that fit best once the minima f32[blocks] are the stored ones: fp16 moves them by more."""
    return _refit_affine(values.reshape(-1, BLOCK), *_counts(values, importance), scale, least, top)


def _counts(values: F32, importance: F32) -> tuple[F32, F32]:
    """The importance f32[blocks of a row, 32], and the mean square f32[n] of each row."""
    counts = np.ascontiguousarray(importance, np.float32).reshape(-1, BLOCK)
    return counts, _mean_squares(values.reshape(len(values), -1, BLOCK))


@njit(cache=True, nogil=True)
def _mean_squares(rows: F32) -> F32:  # pragma: no cover
    out = np.empty(rows.shape[0], np.float32)
    sums = np.empty(BLOCK, np.float32)
    for row in range(rows.shape[0]):
        sums[:] = 0
        for block in range(rows.shape[1]):
            for j in range(BLOCK):
                sums[j] += rows[row, block, j] * rows[row, block, j]
        total = np.float32(0)
        for j in range(BLOCK):
            total += sums[j]
        out[row] = total / np.float32(rows.shape[1] * BLOCK)
    return out


@njit(cache=True, nogil=True)
def _load(blocks: F32, counts: F32, squares: F32, start: int, x: F32, w: F32) -> int:  # pragma: no cover
    """Blocks from `start` on into lanes: values x and weights w f32[32, lanes]. Returns how many; the rest is zero."""
    lanes: int = min(_LANES, blocks.shape[0] - start)
    x[:], w[:] = 0, 0
    for lane in range(lanes):
        row, group = divmod(start + lane, counts.shape[0])
        for j in range(BLOCK):
            value = blocks[start + lane, j]
            x[j, lane] = value
            w[j, lane] = counts[group, j] * np.sqrt(squares[row] + value * value)
    return lanes


@njit(cache=True, nogil=True)
def _search_symmetric(blocks: F32, counts: F32, squares: F32, ends: F32, half: int) -> F32:  # pragma: no cover
    scale = np.empty(blocks.shape[0], np.float32)
    x = np.empty((BLOCK, _LANES), np.float32)
    w = np.empty((BLOCK, _LANES), np.float32)
    inv = np.empty(_LANES, np.float32)
    num = np.empty(_LANES, np.float32)
    den = np.empty(_LANES, np.float32)
    for start in range(0, blocks.shape[0], _LANES):
        lanes = _load(blocks, counts, squares, start, x, w)
        extreme = np.zeros(_LANES, np.float32)
        best = np.zeros(_LANES, np.float32)
        fitted = np.zeros(_LANES, np.float32)
        for j in range(BLOCK):
            for lane in range(_LANES):
                extreme[lane] = x[j, lane] if abs(x[j, lane]) > abs(extreme[lane]) else extreme[lane]
        for candidate in range(ends.shape[0] + _REFITS):
            for lane in range(_LANES):
                if candidate < ends.shape[0]:
                    inv[lane] = ends[candidate] / extreme[lane] if abs(extreme[lane]) > _TINY else np.float32(0)
                else:
                    inv[lane] = np.float32(1) / fitted[lane] if abs(fitted[lane]) > _TINY else np.float32(0)
            _fit_symmetric(x, w, inv, np.float32(-half), np.float32(half - 1), num, den)
            for lane in range(_LANES):
                found = num[lane] / den[lane] if den[lane] > 0 else np.float32(0)
                gain = found * num[lane]
                if gain > best[lane]:
                    best[lane] = gain
                    fitted[lane] = found
        scale[start : start + lanes] = fitted[:lanes]
    return scale


@njit(cache=True, nogil=True)
def _fit_symmetric(
    x: F32, w: F32, inv: F32, least: np.float32, most: np.float32, num: F32, den: F32
) -> None:  # pragma: no cover
    """num = <w x, u>, den = <w u, u> of each lane, u = clamp(round(x * inv), least, most)."""
    num[:], den[:] = 0, 0
    for j in range(0, BLOCK, _TERMS):
        for lane in range(_LANES):
            above, below = num[lane], den[lane]
            for term in range(_TERMS):
                value = x[j + term, lane]
                u = min(max((value * inv[lane] + _ROUND) - _ROUND, least), most)
                counted = w[j + term, lane] * u
                above += value * counted
                below += u * counted
            num[lane], den[lane] = above, below


@njit(cache=True, nogil=True)
def _search_affine(blocks: F32, counts: F32, squares: F32, spans: F32, top: int) -> tuple[F32, F32]:  # pragma: no cover
    scale = np.empty(blocks.shape[0], np.float32)
    least = np.empty(blocks.shape[0], np.float32)
    x = np.empty((BLOCK, _LANES), np.float32)
    w = np.empty((BLOCK, _LANES), np.float32)
    inv = np.empty(_LANES, np.float32)
    shift = np.empty(_LANES, np.float32)
    sums = np.empty((3, _LANES), np.float32)
    for start in range(0, blocks.shape[0], _LANES):
        lanes = _load(blocks, counts, squares, start, x, w)
        low = x[0].copy()
        high = x[0].copy()
        for j in range(1, BLOCK):
            for lane in range(_LANES):
                low[lane], high[lane] = min(low[lane], x[j, lane]), max(high[lane], x[j, lane])
        sum_w = np.zeros(_LANES, np.float32)
        sum_x = np.zeros(_LANES, np.float32)
        for j in range(BLOCK):  # from here on x counts from the block's minimum, which keeps the sums exact
            for lane in range(_LANES):
                x[j, lane] -= low[lane]
                sum_w[lane] += w[j, lane]
                sum_x[lane] += w[j, lane] * x[j, lane]
        best = np.full(_LANES, -1, np.float32)
        slope = np.zeros(_LANES, np.float32)
        offset = np.zeros(_LANES, np.float32)
        for candidate in range(spans.shape[0] + _REFITS):
            for lane in range(_LANES):
                if candidate < spans.shape[0]:
                    span = high[lane] - low[lane]
                    inv[lane] = spans[candidate] / span if span > _TINY else np.float32(0)
                    shift[lane] = 0
                else:
                    inv[lane] = np.float32(1) / slope[lane] if slope[lane] > _TINY else np.float32(0)
                    shift[lane] = offset[lane]
            _fit_affine(x, w, inv, shift, np.float32(top), sums)
            for lane in range(_LANES):
                codes, squared, product = sums[0, lane], sums[1, lane], sums[2, lane]
                det = sum_w[lane] * squared - codes * codes
                if det <= 0:
                    continue
                a = (sum_w[lane] * product - sum_x[lane] * codes) / det
                b = (squared * sum_x[lane] - codes * product) / det
                gain = a * product + b * sum_x[lane]
                if a > 0 and gain > best[lane]:
                    best[lane], slope[lane], offset[lane] = gain, a, b
        for lane in range(lanes):
            scale[start + lane] = slope[lane]
            least[start + lane] = low[lane] + offset[lane]
    return scale, least


@njit(cache=True, nogil=True)
def _refit_affine(blocks: F32, counts: F32, squares: F32, scale: F32, least: F32, top: int) -> F32:  # pragma: no cover
    fitted = scale.copy()
    x = np.empty((BLOCK, _LANES), np.float32)
    w = np.empty((BLOCK, _LANES), np.float32)
    inv = np.empty(_LANES, np.float32)
    shift = np.empty(_LANES, np.float32)
    sums = np.empty((3, _LANES), np.float32)
    for start in range(0, blocks.shape[0], _LANES):
        lanes = _load(blocks, counts, squares, start, x, w)
        shift[:], inv[:] = 0, 0
        for lane in range(lanes):
            shift[lane] = least[start + lane]
            if scale[start + lane] > _TINY:
                inv[lane] = np.float32(1) / scale[start + lane]
        for j in range(BLOCK):
            for lane in range(_LANES):
                x[j, lane] -= shift[lane]
        shift[:] = 0
        _fit_affine(x, w, inv, shift, np.float32(top), sums)
        for lane in range(lanes):
            if sums[2, lane] > 0:
                fitted[start + lane] = sums[2, lane] / sums[1, lane]
    return fitted


@njit(cache=True, nogil=True)
def _fit_affine(x: F32, w: F32, inv: F32, shift: F32, top: np.float32, sums: F32) -> None:  # pragma: no cover
    """<w, l>, <w l, l>, <w l, x> of each lane, l = clamp(round((x - shift) * inv), 0, top)."""
    sums[:] = 0
    zero = np.float32(0)
    for j in range(0, BLOCK, _TERMS):
        for lane in range(_LANES):
            codes, squared, product = sums[0, lane], sums[1, lane], sums[2, lane]
            for term in range(_TERMS):
                value = x[j + term, lane]
                code = min(max(((value - shift[lane]) * inv[lane] + _ROUND) - _ROUND, zero), top)
                counted = w[j + term, lane] * code
                codes += counted
                squared += code * counted
                product += value * counted
            sums[0, lane], sums[1, lane], sums[2, lane] = codes, squared, product
