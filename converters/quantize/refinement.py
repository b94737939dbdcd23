"""What AdaRound and SignRound share: the problem that they solve by gradient, some rows at a time, and what of their
answers is kept.

Codes are to change so that tr((T - Q) H (T - Q)^T) falls; T is what a matrix should be, Q what it is quantized to, H
the second moments of its inputs. The papers run a layer, or a block of layers, on its inputs and differentiate through
it. For one layer that comes to the gradient -2 (T - Q) H: nothing is run, and rows do not know of one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.arrays import products
from converters.quantize.half import scales_to_fp16
from converters.quantize.scheme import Scheme
from converters.quantize.tensor import F32, QuantTensor

Refine = Callable[[F32, F32, QuantTensor, Scheme], QuantTensor]
"""target f32[out, in]; hessian f32[in, in], with what damps it; what to start from, and its scheme -> what leaves no
more error in any row."""

REFINED_ARRAYS = 12  # float32 arrays of REFINED_ELEMENTS that a refinement holds at most
REFINED_ELEMENTS = 1 << 20  # that are refined at once, or one row
_LESS_THAN_HALF = np.float32(0.49)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of the problem: target f32[n, in], codes f32[n, in], scale and zero f32[n, groups].

    hessian: f32[in, in]
    anchor: f32[n, in], the target in steps of the grid, counted from the zero; where it would not round to the code
    that there is, the number nearest to it that does.
    """

    target: F32
    codes: F32
    scale: F32
    zero: F32
    hessian: F32
    anchor: F32

    def product(self, error: F32) -> F32:
        """f32[n, in]: errors times H, which is -1/2 of the loss's gradient by the quantized weights."""
        return products().product(error, self.hessian)

    def losses(self, codes: F32, scale: F32) -> NDArray[np.float64]:
        """f64[n]: what codes f32[n, in] with scales f32[n, groups] cost each row."""
        size = codes.shape[1] // scale.shape[1]
        error = codes - np.repeat(self.zero, size, axis=1)
        error *= np.repeat(scale, size, axis=1)
        np.subtract(self.target, error, out=error)
        return losses(error, self.product(error))


def refine(target: F32, hessian: F32, start: QuantTensor, descend: Callable[[Rows], tuple[F32, F32]]) -> QuantTensor:
    """`start` with what `descend` finds for some rows at a time, codes f32[n, in] and scales f32[n, groups]; a row that
    does not cost less by these stays what it was."""
    codes, scale = start.codes.copy(), start.scale.copy()
    for where, rows in _rows_of(target, hessian, start):
        found, wanted = descend(rows)
        stored = scales_to_fp16(wanted, None if start.zero is None else rows.zero, rows.target)
        better = rows.losses(found, stored.astype(np.float32)) < rows.losses(rows.codes, rows.scale)
        codes[where][better], scale[where][better] = found[better], stored[better]
    return QuantTensor(codes, scale, start.zero, start.bits)


def losses(error: F32, product: F32) -> NDArray[np.float64]:
    """f64[n]: what errors f32[n, in], whose product with H is f32[n, in], cost each row."""
    sums: NDArray[np.float64] = np.einsum("ij,ij->i", error, product, dtype=np.float64)
    return sums


def _rows_of(target: F32, hessian: F32, start: QuantTensor) -> Iterator[tuple[slice, Rows]]:
    """The whole problem, some rows at a time."""
    out, width = start.shape
    step = max(1, REFINED_ELEMENTS // width)
    zeros = start.zeros()
    for first in range(0, out, step):
        rows = slice(first, min(first + step, out))
        scale, zero = start.scale[rows].astype(np.float32), zeros[rows].astype(np.float32)
        codes, wanted = start.codes[rows].astype(np.float32), np.ascontiguousarray(target[rows])
        yield rows, Rows(wanted, codes, scale, zero, hessian, _anchor(wanted, codes, scale, zero))


def _anchor(target: F32, codes: F32, scale: F32, zero: F32) -> F32:
    groups = target.reshape(*scale.shape, -1)
    steps = np.divide(groups, scale[..., None], out=np.zeros_like(groups), where=scale[..., None] != 0)
    here = codes.reshape(groups.shape) - zero[..., None]
    anchor: F32 = np.clip(steps, here - _LESS_THAN_HALF, here + _LESS_THAN_HALF).reshape(target.shape)
    return anchor
