"""Kernels of the block types whose value is scale times a number of a fixed grid: Q3_K, Q6_K, IQ4_NL and IQ4_XS.

A sub-block's scale is searched over candidates that map its extreme value to `ends`, numbers near the ends of the grid
on either side: with u the grid's numbers nearest to the values, the best scale for them is <w x, u> / <w u, u>, and the
candidate with the largest <w x, u>^2 / <w u, u> leaves the least weighted error. Where a superblock keeps its
sub-blocks' scales as small integers times one fp16 number d, d is then chosen so that the scales lose least, each
sub-block tries the integers around its own scale with its values rounded anew, and d is fitted by least squares to what
was chosen. Codes are at last the nearest ones under the stored scales.

Sub-blocks are laid out as vector lanes, and every sum runs in one fixed order within a lane or within a superblock, so
that the result depends neither on vector width nor on how a matrix is cut into blocks of rows. All kernels live in this
one module because numba's cache notices changes of a function's own file only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from converters.quantize.tensor import F32, U8

I8 = NDArray[np.int8]

# What an error counts, as ggml-quants.c weighs it.
WEIGH_SQUARE = 0  # x^2
WEIGH_IMPORTANCE = 1  # importance
WEIGH_BOTH = 2  # importance * sqrt(2 mean(x^2) + x^2), the mean over a block

LANES = 64
CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl, ggml-common.h
_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds a float32 below 2**22 to an integer, half to even
_TINY = np.float32(1e-15)  # a sub-block that stays below is stored as zeros, as ggml does
_HALF_TINY = np.float32(2.0**-14)  # fp16 is spaced by 2**-24 below
_HALF_STEP = np.float32(2.0**-24)
_CANDIDATES = 16  # values of d that are tried
_REACH = 1  # integers on either side of a sub-block's scale that are tried
_REFITS = 1  # of scales that are stored themselves
_MARGIN = np.float32(1.000001)  # a gain must be more than rounding errors: else the sub-blocks of a constant differ
_TERMS = 8  # values of a lane between two stores of its sums
_TERMS_CODEBOOK = 2  # more do not fit the registers
_RUN = 16  # values of a row that are stored as one vector; divides every sub-block

# Rows of a tile's state f32[_STATES, LANES].
_EXTREME, _SCALE, _WEIGHT, _D, _CHOSEN, _INVERSE, _NUM = range(7)
_DEN, _BEST, _BASE, _TRIAL, _BEST_NUM, _BEST_DEN, _MEAN = range(7, 14)
_STATES = 14


class Grid(NamedTuple):
    """What a block type can store.

    size:       values in a sub-block
    codebook:   whether codes index CODEBOOK; otherwise they are integers `low` to `high`, kept as code - low
    scale_low, scale_high: integers that a sub-block's scale can be, times d
    """

    size: int
    codebook: bool
    low: np.float32
    high: np.float32
    scale_low: np.float32
    scale_high: np.float32


@njit(cache=True, nogil=True, inline="always", error_model="numpy")
def _round_half(x: np.float32) -> np.float32:  # pragma: no cover
    """The nearest fp16 number, as float32; one beyond fp16's range is only rounded to 11 significant bits."""
    if abs(x) < _HALF_TINY:
        return (x + np.float32(0.75)) - np.float32(0.75)
    split = x * np.float32(8193)
    return split - (split - x)


@njit(cache=True, nogil=True, error_model="numpy")
def _nearest(a: np.float32) -> np.float32:  # pragma: no cover
    """The number of CODEBOOK nearest to `a`; the lower one of two."""
    u = np.float32(-127)
    u += np.float32(23) if a > np.float32(-115.5) else np.float32(0)
    u += np.float32(21) if a > np.float32(-93.5) else np.float32(0)
    u += np.float32(18) if a > np.float32(-74) else np.float32(0)
    u += np.float32(16) if a > np.float32(-57) else np.float32(0)
    u += np.float32(14) if a > np.float32(-42) else np.float32(0)
    u += np.float32(13) if a > np.float32(-28.5) else np.float32(0)
    u += np.float32(12) if a > np.float32(-16) else np.float32(0)
    u += np.float32(11) if a > np.float32(-4.5) else np.float32(0)
    u += np.float32(12) if a > np.float32(7) else np.float32(0)
    u += np.float32(12) if a > np.float32(19) else np.float32(0)
    u += np.float32(13) if a > np.float32(31.5) else np.float32(0)
    u += np.float32(15) if a > np.float32(45.5) else np.float32(0)
    u += np.float32(16) if a > np.float32(61) else np.float32(0)
    u += np.float32(20) if a > np.float32(79) else np.float32(0)
    u += np.float32(24) if a > np.float32(101) else np.float32(0)
    return u


@njit(cache=True, nogil=True, error_model="numpy")
def _sums(x: F32, w: F32, grid: Grid, state: F32) -> None:  # pragma: no cover
    """NUM = <w x, u>, DEN = <w u, u> of each lane, u the grid's number nearest to x * INVERSE.

    x, w: f32[size, LANES].
    """
    low = grid.low + _MAGIC
    high = grid.high + _MAGIC
    for lane in range(LANES):
        state[_NUM, lane] = 0
        state[_DEN, lane] = 0
    if grid.codebook:
        for j in range(0, x.shape[0], _TERMS_CODEBOOK):
            for lane in range(LANES):
                num = state[_NUM, lane]
                den = state[_DEN, lane]
                for term in range(_TERMS_CODEBOOK):
                    u = _nearest(x[j + term, lane] * state[_INVERSE, lane])
                    counted = w[j + term, lane] * u
                    num += x[j + term, lane] * counted
                    den += u * counted
                state[_NUM, lane] = num
                state[_DEN, lane] = den
        return
    for j in range(0, x.shape[0], _TERMS):
        for lane in range(LANES):
            num = state[_NUM, lane]
            den = state[_DEN, lane]
            for term in range(_TERMS):
                u = min(max(x[j + term, lane] * state[_INVERSE, lane] + _MAGIC, low), high) - _MAGIC
                counted = w[j + term, lane] * u
                num += x[j + term, lane] * counted
                den += u * counted
            state[_NUM, lane] = num
            state[_DEN, lane] = den


@njit(cache=True, nogil=True, error_model="numpy")
def _load(
    values: F32, importance: F32, weigh: int, first: int, count: int, block: int, x: F32, w: F32, state: F32
) -> None:  # pragma: no cover
    """Sub-blocks [first, first + count) into lanes, zeros in the rest; their weights, and EXTREME with its sign.

    values f32[n, size], importance f32[m, size] (sub-block i has row i % m); `block` lanes make one block.
    """
    size = values.shape[1]
    for lane in range(count):
        for j in range(size):
            x[j, lane] = values[first + lane, j]
    for lane in range(count, LANES):
        for j in range(size):
            x[j, lane] = 0
    for lane in range(LANES):
        state[_EXTREME, lane] = 0
    for j in range(size):
        for lane in range(LANES):
            if abs(x[j, lane]) > abs(state[_EXTREME, lane]):
                state[_EXTREME, lane] = x[j, lane]
    if weigh == WEIGH_SQUARE:
        for j in range(size):
            for lane in range(LANES):
                w[j, lane] = x[j, lane] * x[j, lane]
        return
    row = first % importance.shape[0]
    for lane in range(LANES):
        for j in range(size):
            w[j, lane] = importance[row, j]
        row = row + 1 if row + 1 < importance.shape[0] else 0
    if weigh == WEIGH_BOTH:
        for lane in range(LANES):
            state[_MEAN, lane] = 0
        for j in range(size):
            for lane in range(LANES):
                state[_MEAN, lane] += x[j, lane] * x[j, lane]
        for lane in range(0, LANES, block):
            total = np.float32(0)
            for sub in range(block):
                total += state[_MEAN, lane + sub]
            for sub in range(block):
                state[_MEAN, lane + sub] = total * np.float32(2) / np.float32(size * block)
        for j in range(size):
            for lane in range(LANES):
                w[j, lane] *= np.sqrt(state[_MEAN, lane] + x[j, lane] * x[j, lane])


@njit(cache=True, nogil=True, error_model="numpy")
def _search(x: F32, w: F32, grid: Grid, ends: F32, refits: int, stored: bool, state: F32) -> None:  # pragma: no cover
    """The best SCALE of each lane and its WEIGHT <w u, u>, by how much an error of the scale counts.

    After the candidates, the best scale's own codes are fitted again, `refits` times. stored: SCALE itself will be
    stored as fp16, so each is rounded before it is judged.
    """
    for lane in range(LANES):
        state[_SCALE, lane] = state[_EXTREME, lane] / ends[0]
        state[_WEIGHT, lane] = 0
        state[_BEST, lane] = 0
    for candidate in range(ends.shape[0] + refits):
        for lane in range(LANES):
            if candidate < ends.shape[0]:
                inverse = ends[candidate] / state[_EXTREME, lane]
            else:
                inverse = np.float32(1) / state[_SCALE, lane]
            state[_INVERSE, lane] = inverse if abs(state[_EXTREME, lane]) > _TINY else np.float32(0)
        _sums(x, w, grid, state)
        for lane in range(LANES):
            fitted = state[_NUM, lane] / state[_DEN, lane]  # NaN where DEN is 0, and so is the gain
            if stored:
                fitted = _round_half(fitted)
            gain = fitted * (state[_NUM, lane] + state[_NUM, lane] - fitted * state[_DEN, lane])
            better = gain > state[_BEST, lane] * _MARGIN
            state[_SCALE, lane] = fitted if better else state[_SCALE, lane]
            state[_WEIGHT, lane] = state[_DEN, lane] if better else state[_WEIGHT, lane]
            state[_BEST, lane] = gain if better else state[_BEST, lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _choose_d(state: F32, first: int, block: int, grid: Grid, trial: F32) -> None:  # pragma: no cover
    """D of the lanes [first, first + block): the fp16 number whose multiples by integers are nearest to their SCALEs.

    Candidates grow from the one that maps the largest scale to scale_low, each by what moves that scale by half an
    integer, or by fp16's spacing if that is more. trial: f32[3, _CANDIDATES], scratch.
    """
    top = np.float32(0)
    for lane in range(first, first + block):
        top = state[_SCALE, lane] if abs(state[_SCALE, lane]) > abs(top) else top
    least = _round_half(top / grid.scale_low)
    move = max(abs(least * np.float32(0.5) / grid.scale_low), _HALF_STEP)
    if top > 0:  # scale_low is negative
        move = -move
    for c in range(_CANDIDATES):
        d = _round_half(least + np.float32(c) * move)
        trial[0, c] = d
        trial[1, c] = np.float32(1) / d if d != 0 else np.float32(0)
        trial[2, c] = 0
    low, high = grid.scale_low + _MAGIC, grid.scale_high + _MAGIC
    for lane in range(first, first + block):
        for c in range(_CANDIDATES):
            whole = min(max(state[_SCALE, lane] * trial[1, c] + _MAGIC, low), high) - _MAGIC
            rest = state[_SCALE, lane] - trial[0, c] * whole
            trial[2, c] += state[_WEIGHT, lane] * rest * rest
    best = 0
    for c in range(1, _CANDIDATES):
        if trial[2, c] < trial[2, best]:
            best = c
    for lane in range(first, first + block):
        state[_D, lane] = trial[0, best]


@njit(cache=True, nogil=True, error_model="numpy")
def _fit_integers(x: F32, w: F32, grid: Grid, block: int, state: F32) -> None:  # pragma: no cover
    """CHOSEN: the integer that serves each lane best under its D, among those around its SCALE. Then refit D."""
    for lane in range(LANES):
        whole = state[_SCALE, lane] / state[_D, lane] if state[_D, lane] != 0 else np.float32(0)
        state[_BASE, lane] = (min(max(whole, grid.scale_low), grid.scale_high) + _MAGIC) - _MAGIC
        state[_CHOSEN, lane] = 0
        state[_BEST, lane] = 0
        state[_BEST_NUM, lane] = 0
        state[_BEST_DEN, lane] = 0
    for offset in range(-_REACH, _REACH + 1):
        for lane in range(LANES):
            trial = min(max(state[_BASE, lane] + np.float32(offset), grid.scale_low), grid.scale_high)
            scale = trial * state[_D, lane]
            inverse = np.float32(1) / scale
            state[_INVERSE, lane] = inverse if scale != 0 else np.float32(0)
            state[_TRIAL, lane] = trial
        _sums(x, w, grid, state)
        for lane in range(LANES):
            scale = state[_TRIAL, lane] * state[_D, lane]
            gain = scale * (state[_NUM, lane] + state[_NUM, lane] - scale * state[_DEN, lane])
            better = gain > state[_BEST, lane]
            state[_CHOSEN, lane] = state[_TRIAL, lane] if better else state[_CHOSEN, lane]
            state[_BEST_NUM, lane] = state[_NUM, lane] if better else state[_BEST_NUM, lane]
            state[_BEST_DEN, lane] = state[_DEN, lane] if better else state[_BEST_DEN, lane]
            state[_BEST, lane] = gain if better else state[_BEST, lane]
    for first in range(0, LANES, block):
        num = np.float32(0)
        den = np.float32(0)
        for lane in range(first, first + block):
            num += state[_CHOSEN, lane] * state[_BEST_NUM, lane]
            den += state[_CHOSEN, lane] * state[_CHOSEN, lane] * state[_BEST_DEN, lane]
        if den > 0:
            d = _round_half(num / den)
            for lane in range(first, first + block):
                state[_D, lane] = d


@njit(cache=True, nogil=True, error_model="numpy")
def _round_codes(values: F32, first: int, count: int, grid: Grid, state: F32, codes: U8) -> None:  # pragma: no cover
    """codes u8[n, size] of sub-blocks [first, first + count): the nearest under the stored scales D * CHOSEN."""
    for lane in range(LANES):
        scale = state[_D, lane] * state[_CHOSEN, lane]
        inverse = np.float32(1) / scale
        state[_INVERSE, lane] = inverse if scale != 0 else np.float32(0)
    for lane in range(count):
        inverse = state[_INVERSE, lane]
        row = first + lane
        if grid.codebook:
            for j in range(values.shape[1]):
                codes[row, j] = np.uint8(_index(values[row, j] * inverse))
        else:
            for run in range(0, values.shape[1], _RUN):
                for j in range(_RUN):
                    code = min(max((values[row, run + j] * inverse + _MAGIC) - _MAGIC, grid.low), grid.high) - grid.low
                    codes[row, run + j] = np.uint8(np.int32(code))


@njit(cache=True, nogil=True, error_model="numpy")
def _index(a: np.float32) -> np.int32:  # pragma: no cover
    """The index in CODEBOOK of _nearest(a)."""
    index = np.int32(a > np.float32(-115.5)) + np.int32(a > np.float32(-93.5)) + np.int32(a > np.float32(-74))
    index += np.int32(a > np.float32(-57)) + np.int32(a > np.float32(-42)) + np.int32(a > np.float32(-28.5))
    index += np.int32(a > np.float32(-16)) + np.int32(a > np.float32(-4.5)) + np.int32(a > np.float32(7))
    index += np.int32(a > np.float32(19)) + np.int32(a > np.float32(31.5)) + np.int32(a > np.float32(45.5))
    index += np.int32(a > np.float32(61)) + np.int32(a > np.float32(79)) + np.int32(a > np.float32(101))
    return index


@njit(cache=True, nogil=True, error_model="numpy")
def fill_superblocks(
    values: F32,
    importance: F32,
    weigh: int,
    grid: Grid,
    ends: F32,
    d: F32,
    scales: I8,
    codes: U8,
) -> None:  # pragma: no cover
    """Fill d f32[n] (fp16 numbers), scales i8[n, subs] and codes u8[n * subs, size].

    values: f32[n * subs, size] sub-blocks, importance f32[m, size]; see _search, _choose_d, _fit_integers for the rest.
    """
    size = values.shape[1]
    block = scales.shape[1]
    x = np.empty((size, LANES), np.float32)
    w = np.empty((size, LANES), np.float32)
    state = np.zeros((_STATES, LANES), np.float32)
    trial = np.empty((3, _CANDIDATES), np.float32)
    for first in range(0, values.shape[0], LANES):
        count = min(LANES, values.shape[0] - first)
        _load(values, importance, weigh, first, count, block, x, w, state)
        _search(x, w, grid, ends, 0, False, state)
        for lane in range(0, LANES, block):
            _choose_d(state, lane, block, grid, trial)
        _fit_integers(x, w, grid, block, state)
        _round_codes(values, first, count, grid, state, codes)
        for lane in range(count):
            row, sub = divmod(first + lane, block)
            d[row] = state[_D, lane]
            scales[row, sub] = np.int8(state[_CHOSEN, lane])


@njit(cache=True, nogil=True, error_model="numpy")
def fill_blocks(
    values: F32, importance: F32, weigh: int, grid: Grid, ends: F32, d: F32, codes: U8
) -> None:  # pragma: no cover
    """Fill d f32[n] (fp16 numbers) and codes u8[n, size] of blocks f32[n, size].

    For block types without sub-blocks: importance f32[m, size]; ends as in _search.
    """
    size = values.shape[1]
    x = np.empty((size, LANES), np.float32)
    w = np.empty((size, LANES), np.float32)
    state = np.zeros((_STATES, LANES), np.float32)
    for lane in range(LANES):
        state[_CHOSEN, lane] = 1
    for first in range(0, values.shape[0], LANES):
        count = min(LANES, values.shape[0] - first)
        _load(values, importance, weigh, first, count, 1, x, w, state)
        _search(x, w, grid, ends, _REFITS, True, state)
        for lane in range(LANES):
            state[_D, lane] = _round_half(state[_SCALE, lane])
        _round_codes(values, first, count, grid, state, codes)
        for lane in range(count):
            d[first + lane] = state[_D, lane]
