"""Rounding up or down, chosen by gradient for the layer's output: AdaRound.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv 2004.10568). A
weight becomes s * clip(floor(w / s) + h(v)) with the rectified sigmoid h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1). Adam
(Kingma & Ba 2014, arXiv 1412.6980) brings down the squared error of the output and a regularizer, the sum of
1 - |2 h - 1|^b, in which b falls from 20 to 2, so that every h ends at 0 or 1. For the first fifth of the steps there
is none. Scales stay what they are.

- w is the anchor of refinement.py, so that it starts from any codes: each stays, or moves by one to the weight's side;
  at an end of the range, to the only side there is.
- The error of a row counts in units of its mean s^2 H_jj. The paper's error is of any size, its regularizer is not, so
  that one weight of it means something else for each layer.
- A row that ends worse than it started, once all are rounded, stays what it was.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from converters.quantize.grid import IntegerGrid
from converters.quantize.refinement import Rows, refine
from converters.quantize.scheme import Scheme
from converters.quantize.tensor import F32, QuantTensor

ADAROUND_STEPS = 500
_RATE = 0.03  # of Adam
_WEIGHT = 10.0  # of the regularizer
_WARM = 0.2  # of the steps are without it
_FIRST_POWER, _LAST_POWER = 20.0, 2.0
_MEAN, _SQUARE = 0.9, 0.999  # Adam's decay
_SPREAD, _BEYOND = np.float32(1.2), np.float32(0.1)
_TINY = np.float32(1e-8)
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


def refine_adaround(
    target: F32, hessian: F32, start: QuantTensor, scheme: Scheme, steps: int = ADAROUND_STEPS
) -> QuantTensor:
    """Change codes so that the error (T - Q) H (T - Q)^T of each row of the target f32[out, in] falls.

    hessian: f32[in, in], H with what damps it. start: quantized to the integer scheme. steps: each takes a product of
    the matrix with H. No row of what is returned costs more than in `start`.
    """
    grid = IntegerGrid.of(scheme)
    return refine(target, hessian, start, lambda rows: (_descend(rows, grid, steps), rows.scale))


def _descend(rows: Rows, grid: IntegerGrid, steps: int) -> F32:
    """f32[n, in]: the codes that are reached."""
    size = rows.target.shape[1] // rows.scale.shape[1]
    scale, zero = np.repeat(rows.scale, size, axis=1), np.repeat(rows.zero, size, axis=1)
    floor = np.clip(np.floor(rows.anchor), grid.low - zero, grid.top - 1 - zero)
    up = np.clip(rows.anchor - floor, 0.01, 0.99)  # at 0 and 1 there is no gradient
    logit = np.log((up + _BEYOND) / (_ONE + _BEYOND - up))
    units = np.mean(np.square(scale) * np.diagonal(rows.hessian), axis=1)
    unit = np.divide(1, units, out=np.zeros_like(units), where=units > 0)
    mean, square = np.zeros_like(logit), np.zeros_like(logit)
    error = rows.target - scale * (floor + up)
    for step in range(steps):
        done = step / steps
        weight = _WEIGHT if done >= _WARM else 0.0
        power = _FIRST_POWER + (_LAST_POWER - _FIRST_POWER) * max(done - _WARM, 0) / (1 - _WARM)
        rate, debias = _RATE / (1 - _MEAN ** (step + 1)), 1 / (1 - _SQUARE ** (step + 1))
        scalars = np.array([weight, power, rate, debias], np.float32)
        _step(rows.target, floor, scale, unit, rows.product(error), scalars, logit, up, mean, square, error)
    codes: F32 = floor + (up >= 0.5) + zero
    return codes


@njit(cache=True, nogil=True, error_model="numpy")
def _step(
    target: F32,
    floor: F32,
    scale: F32,
    unit: F32,
    product: F32,
    scalars: F32,
    logit: F32,
    up: F32,
    mean: F32,
    square: F32,
    error: F32,
) -> None:  # pragma: no cover
    """One step of Adam.

    product: error times H; scalars: the regularizer's weight and power, Adam's rate and the correction of its squares.
    up = h(logit), from which the sigmoid can be told while it is between 0 and 1; beyond there is no gradient.
    """
    weight, power, rate, debias = scalars
    for i in range(len(up)):
        for j in range(up.shape[1]):
            h, slope = up[i, j], _ZERO
            if _ZERO < h < _ONE:
                slope = -_TWO * product[i, j] * scale[i, j] * unit[i]
                off = _TWO * h - _ONE
                if weight > 0 and off != 0:
                    slope -= weight * _TWO * power * np.copysign(abs(off) ** (power - _ONE), off)
                sigmoid = (h + _BEYOND) / _SPREAD
                slope *= _SPREAD * sigmoid * (_ONE - sigmoid)
            m = np.float32(_MEAN) * mean[i, j] + np.float32(1 - _MEAN) * slope
            n = np.float32(_SQUARE) * square[i, j] + np.float32(1 - _SQUARE) * slope * slope
            v = logit[i, j] - rate * m / (np.sqrt(n * debias) + _TINY)
            h = min(max(_SPREAD / (_ONE + np.exp(-v)) - _BEYOND, _ZERO), _ONE)
            mean[i, j], square[i, j], logit[i, j], up[i, j] = m, n, v, h
            error[i, j] = target[i, j] - scale[i, j] * (floor[i, j] + h)
