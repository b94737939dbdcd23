"""Rounding refined by the signs of gradients, and scales with it: SignRound.

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (arXiv
2309.05516). A weight w becomes s * clip(round(w / s + v)), where every v in [-0.5, 0.5] and a
factor a on the scale of every group are found by steps of sign(gradient), whose size falls linearly to 0 and adds up to
0.5. Rounding is differentiated as if it were not there. The best that was met on the way is kept.

- The paper runs a block of layers; here the error is that of the layer's output (see refinement.py).
- The paper's a and b cut the two ends of a group's range. Our zeros stay what they are, so there is one factor, within
  0.5 and 1.5 of the scale that there was, which a search has chosen already; the scale is what the grid holds.
- The best is kept row by row: so no row ends worse than it started.
- w is the anchor of refinement.py, so that it starts from any codes, not from rounded ones alone.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from converters.quantize.grid import IntegerGrid
from converters.quantize.refinement import Rows, losses, refine
from converters.quantize.scheme import Scheme
from converters.quantize.tensor import F32, QuantTensor

SIGNROUND_STEPS = 200  # as in the paper
_ROUND = np.float32(12582912.0)  # see gptq_kernels.py
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)


def refine_signround(
    target: F32, hessian: F32, start: QuantTensor, scheme: Scheme, steps: int = SIGNROUND_STEPS
) -> QuantTensor:
    """Change codes and scales so that the error (T - Q) H (T - Q)^T of each row of the target f32[out, in] falls.

    hessian: f32[in, in], H with what damps it. start: quantized to the integer scheme. steps: each takes a product of
    the matrix with H. No row of what is returned costs more than in `start`.
    """
    grid = IntegerGrid.of(scheme)
    return refine(target, hessian, start, lambda rows: _descend(rows, grid, steps))


def _descend(rows: Rows, grid: IntegerGrid, steps: int) -> tuple[F32, F32]:
    """The best codes f32[n, in] and scales f32[n, groups] that were met."""
    low, top = np.float32(grid.low), np.float32(grid.top)
    shift, factor = np.zeros_like(rows.anchor), np.ones_like(rows.scale)
    codes, scale, error = rows.codes.copy(), rows.scale, np.empty_like(rows.target)
    best, best_scale = rows.codes.copy(), rows.scale.copy()
    _round(rows.target, rows.anchor, shift, rows.scale, scale, rows.zero, low, top, codes, error)
    product = rows.product(error)
    least = losses(error, product)
    for step in range(steps):
        rate = np.float32((1 - step / steps) / steps)
        _step(product, rows.anchor, codes, rows.zero, rows.scale, scale, low, top, rate, shift, factor)
        scale = grid.nearest(rows.scale * factor)
        _round(rows.target, rows.anchor, shift, rows.scale, scale, rows.zero, low, top, codes, error)
        product = rows.product(error)
        loss = losses(error, product)
        better = loss < least
        least[better], best[better], best_scale[better] = loss[better], codes[better], scale[better]
    return best, best_scale


@njit(cache=True, nogil=True, error_model="numpy")
def _round(
    target: F32,
    anchor: F32,
    shift: F32,
    first: F32,
    scale: F32,
    zero: F32,
    low: np.float32,
    top: np.float32,
    codes: F32,
    error: F32,
) -> None:  # pragma: no cover
    """Write what shifts and scales, of which `first` are those of the anchor, come to: codes and errors."""
    rows, groups = first.shape
    size = target.shape[1] // groups
    for i in range(rows):
        for g in range(groups):
            s, z = scale[i, g], zero[i, g]
            ratio = first[i, g] / s if s != 0 else _ZERO
            for j in range(g * size, (g + 1) * size):
                x = (anchor[i, j] * ratio + shift[i, j] + _ROUND) - _ROUND
                x = min(max(x, low - z), top - z)
                codes[i, j] = x + z
                error[i, j] = target[i, j] - s * x


@njit(cache=True, nogil=True, error_model="numpy")
def _step(
    product: F32,
    anchor: F32,
    codes: F32,
    zero: F32,
    first: F32,
    scale: F32,
    low: np.float32,
    top: np.float32,
    rate: np.float32,
    shift: F32,
    factor: F32,
) -> None:  # pragma: no cover
    """Move shifts and factors by `rate` against their gradients, of which `product`, error times H, is -1/2 dQ."""
    rows, groups = first.shape
    size = product.shape[1] // groups
    for i in range(rows):
        for g in range(groups):
            s, z = scale[i, g], zero[i, g]
            ratio = first[i, g] / s if s != 0 else _ZERO
            pull = _ZERO
            for j in range(g * size, (g + 1) * size):
                x, code, p = anchor[i, j] * ratio, codes[i, j] - z, product[i, j]
                inside = low - z - _HALF < x + shift[i, j] < top - z + _HALF
                pull += p * (code - x if inside else code)
                if inside:
                    shift[i, j] = min(max(shift[i, j] + rate * np.sign(p * s), -_HALF), _HALF)
            factor[i, g] = min(max(factor[i, g] + rate * np.sign(pull * first[i, g]), _HALF), _ONE + _HALF)
