"""The inner loops of gptq.py: a group of columns, of which each depends on the ones before it.

Arrays are transposed, [in, out], so that the rows of the matrix are vector lanes: 64 rows go through a group together,
and no sum runs across a vector. Every sum is taken in the order of the columns, so the result does not depend on the
vector width of the machine. Arithmetic is float32.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from converters.quantize.tensor import F32, U8

LANES = 64  # rows in a tile
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds below 2**22 to an integer, half to even
_MOST, _NORMAL, _SUBNORMAL = np.float32(65504), np.float32(2**-14), np.float32(0.75)  # see grid.py
_HALF = np.float32(0.501)  # a code moves if that pays by more than the rounding errors of the sums
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


@njit(cache=True, nogil=True, error_model="numpy")
def quantize_columns(
    weight: F32,
    carried: F32,
    feedback: F32,
    cost: F32,
    scale: F32,
    zero: F32,
    factors: F32,
    split: float,
    low: int,
    top: int,
    codes: U8,
    error: F32,
) -> None:  # pragma: no cover
    """Quantize a block of columns one after the other, each after it has taken up the errors of the ones before it.

    weight f32[size, out]; carried f32[size, out]: what the columns before the block add; feedback f32[size, size]: what
    an error of column i adds to column j > i; cost f32[size]: what a squared error costs. scale f32[out] is replaced by
    the best of its multiples by `factors`, of as many bits as `split` leaves; zero f32[out]. Writes codes u8[size, out]
    and error f32[size, out], weight - value.
    """
    size, out = weight.shape
    x, w = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
    e, v = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
    first, z = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    s, loss = np.zeros(LANES, np.float32), np.empty(LANES, np.float32)
    best, least = np.zeros(LANES, np.float32), np.empty(LANES, np.float32)
    for start in range(0, out, LANES):
        lanes = min(LANES, out - start)
        if lanes < LANES:
            x[:] = 0
            w[:] = 0
            first[:] = 0
        for j in range(size):
            for lane in range(lanes):
                w[j, lane] = weight[j, start + lane]
                x[j, lane] = w[j, lane] + carried[j, start + lane]
        for lane in range(lanes):
            first[lane] = scale[start + lane]
            z[lane] = zero[start + lane]
        if len(factors) == 1:
            best[:] = first
        else:
            least[:] = np.inf
            for factor in factors:
                for lane in range(LANES):
                    s[lane] = _on_grid(first[lane] * factor, split)
                _round_in_turn(x, w, feedback, cost, s, z, low, top, v, e, loss)
                for lane in range(LANES):
                    best[lane] = s[lane] if loss[lane] < least[lane] else best[lane]
                    least[lane] = min(loss[lane], least[lane])
        _round_in_turn(x, w, feedback, cost, best, z, low, top, v, e, loss)
        for lane in range(lanes):
            scale[start + lane] = best[lane]
        for j in range(size):
            for lane in range(lanes):
                codes[j, start + lane] = np.uint8(np.int32(v[j, lane] + z[lane]))
                error[j, start + lane] = e[j, lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _round_in_turn(
    x: F32, w: F32, feedback: F32, cost: F32, s: F32, z: F32, low: int, top: int, v: F32, e: F32, loss: F32
) -> None:  # pragma: no cover
    """Integers v (code - zero), errors e and loss f32[LANES] of the lanes under scales s."""
    bottom, end = np.float32(low), np.float32(top)
    inverse, t = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for lane in range(LANES):
        inverse[lane] = _ONE / s[lane] if s[lane] != 0 else _ZERO
        loss[lane] = 0
    for j in range(len(x)):
        t[:] = x[j]
        whole = j - j % 4
        for i in range(0, whole, 4):
            a, b, c, d = feedback[i, j], feedback[i + 1, j], feedback[i + 2, j], feedback[i + 3, j]
            for lane in range(LANES):
                t[lane] += (e[i, lane] * a + e[i + 1, lane] * b) + (e[i + 2, lane] * c + e[i + 3, lane] * d)
        for i in range(whole, j):
            a = feedback[i, j]
            for lane in range(LANES):
                t[lane] += e[i, lane] * a
        a = cost[j]
        for lane in range(LANES):
            step = (t[lane] * inverse[lane] + _ROUND) - _ROUND
            step = min(max(step, bottom - z[lane]), end - z[lane])
            v[j, lane] = step
            value = s[lane] * step
            e[j, lane] = w[j, lane] - value
            loss[lane] += a * (t[lane] - value) * (t[lane] - value)


@njit(cache=True, nogil=True, error_model="numpy")
def sweep_columns(
    weight: F32,
    gradient: F32,
    hessian: F32,
    scale: F32,
    zero: F32,
    split: float,
    low: int,
    top: int,
    passes: int,
    refit: bool,
    codes: U8,
    error: F32,
) -> int:  # pragma: no cover
    """Set each code of a block of columns to the best there is while all others stay, then each scale likewise.

    gradient f32[size, out]: error times the Hessian's columns of the block; hessian f32[size, size]: its block.
    Rewrites codes, error and, with refit, scale. Returns the number of codes and scales that changed.
    """
    size, out = weight.shape
    p, v = np.zeros((size, LANES), np.float32), np.zeros((size, LANES), np.float32)
    s, z, move = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    bottom, end = np.float32(low), np.float32(top)
    changed = 0
    for start in range(0, out, LANES):
        lanes = min(LANES, out - start)
        if lanes < LANES:
            p[:] = 0
            v[:] = 0
            s[:] = 0
        for lane in range(lanes):
            s[lane] = scale[start + lane]
            z[lane] = zero[start + lane]
        for j in range(size):
            for lane in range(lanes):
                p[j, lane] = gradient[j, start + lane]
                v[j, lane] = np.float32(codes[j, start + lane]) - z[lane]
        before = changed
        for _ in range(passes):
            for lane in range(LANES):
                inverse[lane] = _ONE / s[lane] if s[lane] != 0 else _ZERO
            for j in range(size):
                if not hessian[j, j] > 0:
                    continue
                steps = _ONE / hessian[j, j]
                moved = 0
                for lane in range(LANES):
                    off = p[j, lane] * steps * inverse[lane]
                    near = (v[j, lane] + off + _ROUND) - _ROUND
                    near = min(max(near, bottom - z[lane]), end - z[lane])
                    near = near if abs(off) > _HALF else v[j, lane]
                    moved += near != v[j, lane]
                    move[lane] = (near - v[j, lane]) * s[lane]
                    v[j, lane] = near
                if moved:
                    changed += moved
                    _spread(p, hessian[j], move)
            if refit:
                changed += _refit(p, v, hessian, split, s)
        if changed == before:
            continue
        for lane in range(lanes):
            scale[start + lane] = s[lane]
        for j in range(size):
            for lane in range(lanes):
                codes[j, start + lane] = np.uint8(np.int32(v[j, lane] + z[lane]))
                error[j, start + lane] = weight[j, start + lane] - s[lane] * v[j, lane]
    return changed


@njit(cache=True, nogil=True)
def _spread(p: F32, row: F32, move: F32) -> None:  # pragma: no cover
    """p -= row * move, f32[size, LANES]."""
    for k in range(len(p)):
        a = row[k]
        for lane in range(LANES):
            p[k, lane] -= a * move[lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _refit(p: F32, v: F32, hessian: F32, split: float, s: F32) -> int:  # pragma: no cover
    """Scales by least squares with integers v held; where none on the grid is better, the scale stays."""
    size = len(p)
    product, square = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    pull, move = np.empty((size, LANES), np.float32), np.empty(LANES, np.float32)
    for k in range(size):
        t = pull[k]
        t[:] = 0
        whole = size - size % 4
        for i in range(0, whole, 4):
            a, b, c, d = hessian[k, i], hessian[k, i + 1], hessian[k, i + 2], hessian[k, i + 3]
            for lane in range(LANES):
                t[lane] += (v[i, lane] * a + v[i + 1, lane] * b) + (v[i + 2, lane] * c + v[i + 3, lane] * d)
        for i in range(whole, size):
            a = hessian[k, i]
            for lane in range(LANES):
                t[lane] += v[i, lane] * a
        for lane in range(LANES):
            product[lane] += v[k, lane] * p[k, lane]
            square[lane] += v[k, lane] * t[lane]
    changed = 0
    for lane in range(LANES):
        found = _on_grid(s[lane] + (product[lane] / square[lane] if square[lane] > 0 else _ZERO), split)
        step = found - s[lane]
        pays = step != 0 and found != 0 and step * (_TWO * product[lane] - step * square[lane]) > 0
        move[lane] = step if pays else _ZERO
        s[lane] = found if pays else s[lane]
        changed += pays
    if changed:
        for k in range(size):
            for lane in range(LANES):
                p[k, lane] -= pull[k, lane] * move[lane]
    return changed


@njit(cache=True, nogil=True)
def _on_grid(scale: np.float32, split: float) -> np.float32:  # pragma: no cover
    """IntegerGrid.nearest of one scale."""
    large = scale * np.float32(split)
    rounded = large - (large - scale)
    if abs(rounded) < _NORMAL:
        rounded = (rounded + _SUBNORMAL) - _SUBNORMAL
    return rounded if abs(rounded) <= _MOST else _ZERO
