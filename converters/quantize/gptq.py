"""Rounding that makes up for its own errors: GPTQ, refined by coordinate descent.

What counts is the error of a layer's output on calibration inputs X, |W X - Q X|^2 = tr(E H E^T) with E = W - Q and
H = X X^T. GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds one column after the other and lets the columns not yet
rounded take up each error in the best way. With H = R R^T, R upper triangular, the loss is |E R|^2, whose column j
depends on the errors up to j alone. So the best that column j can do about earlier errors is to start from

    w_j + sum over i < j of E_i R_ij / R_jj

after which its rounding error d costs R_jj^2 d^2. This is the paper's update (its U is R^-1) without the inverse, and
what a block takes up from all before it is one matrix product.

The scale of a group is chosen when the group is reached, for the values that it has by then, by the least-squares
search of rtn.py with the columns' costs R_jj^2 as weights; then some multiples of it are tried on the group, rounding
and all. Columns with the largest H_jj go first, while there still are others to take up their errors; groups stay
whole: they are ordered by their sum, the columns inside each by their own, and the stored layout does not change.

Then come sweeps (QuantEase, Behdin et al. 2023, arXiv:2309.01885): every code is set to the best there is while all
others stay, and every scale, where a block of columns is a group, is refitted to its codes. No step makes the loss
larger. AdaRound or SignRound may go over the codes after that.

A layer whose inputs X' come from a quantized model should match W X, not W X' (GPTAQ, Li et al. 2025,
arXiv:2504.02692): |W X - Q X'|^2 is |(W' - Q) X'|^2 and a constant for W' = W X X'^T (X' X'^T)^-1, so W' is what is
quantized. Where its output is added to a value R' that the float model has as R, the sum is what should match, so that
W' = (W X + R - R') X'^T (X' X'^T)^-1.
"""

from __future__ import annotations

from math import gcd

import numpy as np
from numpy.typing import NDArray

from converters.arrays import products
from converters.quantize.gptq_kernels import quantize_columns, sweep_columns
from converters.quantize.grid import IntegerGrid
from converters.quantize.half import scales_to_fp16
from converters.quantize.refinement import Refine
from converters.quantize.rtn import choose_scales
from converters.quantize.scheme import Scheme
from converters.quantize.tensor import F32, U8, QuantTensor

# Multiples of a group's scale that are tried on it, of 4 bits: at 8 the search leaves nothing to gain.
_FACTORS = np.array([1, 0.94, 0.96, 0.98, 1.02, 1.04, 1.06], np.float32)
_BLOCK = 128  # columns that a kernel takes at once; a group up to this long is one block
_SPAN = 512  # columns that take up earlier errors by one matrix product
_PASSES = 2  # over the codes and scales of a block, each time a sweep reaches it
_PANEL = 256  # columns that are factorized at once
_UPDATE = 1024  # columns that a panel's update computes at once: bounds the memory it takes


def quantize_gptq(
    weight: F32,
    hessian: F32,
    scheme: Scheme,
    cross: F32 | None = None,
    deficit: F32 | None = None,
    *,
    damping: float = 0.01,
    match_damping: float = 0.1,
    shrinkage: float = 0.1,
    sweeps: int = 4,
    refine: Refine | None = None,
) -> QuantTensor:
    """Quantize a matrix f32[out, in] for inputs with second moments hessian f32[in, in]; `in` must fit the groups.

    hessian: X X^T or its mean over the columns of X, the inputs that the quantized model feeds the layer.
    cross:   X0 X^T on the same scale, X0 the inputs of the float model; None: X0 = X.
    deficit: (R0 - R) X^T on the same scale, f32[out, in], where the output is added to R, in the float model to R0.
    damping: part of the mean of H's diagonal that is added to the diagonal; ten times as much, and again, if H is
             singular with it. Columns whose inputs were always 0 are just rounded.
    match_damping: the same where the weights are changed to match the float model, which overfits sooner.
    shrinkage: part of each H_jj that is added to it, which is to say that the correlations between inputs are trusted
             that much less in other text than the calibration's.
    sweeps:  at most so many after GPTQ; fewer if one changes nothing.
    refine:  what then goes over a matrix of few bits: at 8 there is nothing to gain.

    ValueError if the moments are not finite, or singular with the damping at its most; OverflowError if a scale does
    not fit fp16. Takes the memory of another Hessian (three with `cross`) and five matrices.
    """
    width = weight.shape[1]
    group = scheme.group_size_for(width)
    assert scheme.is_integer and width % group == 0 and hessian.shape == (width, width), (scheme.name, weight.shape)
    if not all(np.isfinite(moment).all() for moment in (hessian, cross, deficit) if moment is not None):
        raise ValueError("the second moments of the inputs contain NaN or Inf")
    diagonal = np.diagonal(hessian)
    mean = float(diagonal.mean(dtype=np.float64)) or 1.0
    order = _column_order(diagonal, group)
    factor, damp = _factorize_damped(hessian, order, damping * mean, mean, shrinkage * diagonal)
    if cross is not None or deficit is not None:
        weight = _match(weight, hessian, cross, deficit, damp + np.float32((match_damping - damping) * mean))
    state = _State(np.ascontiguousarray(weight.T[order]), scheme)
    _quantize(state, factor)
    del factor
    state.restore(order)
    for _ in range(sweeps):
        if not _sweep(state, hessian, damp):
            break
    if refine is None or scheme.bits >= 8:
        return state.tensor()
    return refine(state.target.T, _damped(hessian, damp), state.tensor(), scheme)


class _State:
    """A matrix on its way: transposed, so that its rows are the lanes of the kernels.

    target f32[in, out], codes u8[in, out], error f32[in, out] = target - value, scale and zero f32[groups, out].
    """

    __slots__ = ("codes", "error", "grid", "group", "scale", "scheme", "size", "target", "zero")

    def __init__(self, target: F32, scheme: Scheme) -> None:
        width, rows = target.shape
        self.scheme, self.target = scheme, target
        self.group = scheme.group_size_for(width)
        self.size = self.group if self.group <= _BLOCK else gcd(self.group, _BLOCK)  # columns of a block
        self.grid = IntegerGrid.of(scheme)
        self.codes: U8 = np.empty((width, rows), np.uint8)
        self.error: F32 = np.empty((width, rows), np.float32)
        self.scale: F32 = np.empty((width // self.group, rows), np.float32)
        self.zero: F32 = np.empty((width // self.group, rows), np.float32)

    def restore(self, order: NDArray[np.int64]) -> None:
        """Put columns that were taken in an order, and their groups, back where they belong."""
        back, groups = np.argsort(order), np.argsort(order[:: self.group])
        self.target, self.codes, self.error = self.target[back], self.codes[back], self.error[back]
        self.scale, self.zero = self.scale[groups], self.zero[groups]

    def tensor(self) -> QuantTensor:
        zero = None if self.scheme.symmetric else np.ascontiguousarray(self.zero.T).astype(np.uint8)
        scale = scales_to_fp16(np.ascontiguousarray(self.scale.T), zero, self.target)
        return QuantTensor(np.ascontiguousarray(self.codes.T), scale, zero, self.scheme.bits)


def _column_order(diagonal: F32, group: int) -> NDArray[np.int64]:
    """Groups by falling sum of H_jj, and the columns of each by falling H_jj."""
    mass = diagonal.reshape(-1, group)
    columns = np.argsort(-mass, axis=1, kind="stable") + np.arange(0, mass.size, group)[:, None]
    order: NDArray[np.int64] = columns[np.argsort(-mass.sum(axis=1), kind="stable")].reshape(-1)
    return order


def _factorize_damped(
    hessian: F32, order: NDArray[np.int64], damping: float, mean: float, shrinkage: F32
) -> tuple[F32, F32]:
    """R of the reordered, damped Hessian, and what was added to the diagonal, f32[in] in the order of the columns."""
    for tried in (damping, *(max(damping, 1e-3 * mean) * ten for ten in (10, 100, 1000))):
        damp = (shrinkage + tried).astype(np.float32)
        factor = hessian[np.ix_(order, order)]
        factor[np.diag_indices(len(factor))] += damp[order]
        try:
            factorize(factor)
        except np.linalg.LinAlgError:
            continue
        return factor, damp
    raise ValueError(f"the second moments of the inputs are singular, even with {tried / mean:g} of their mean added")


def factorize(matrix: NDArray[np.floating]) -> None:
    """Replace a symmetric matrix [n, n], float32 or float64, of which the upper half is read, by the upper triangular R
    with A = R R^T.

    numpy's Cholesky factor is the lower one, and takes three times the memory. LinAlgError if A is not positive.
    """
    multiply = products().product if matrix.dtype == np.float32 else np.matmul  # not every device has float64
    for stop in range(len(matrix), 0, -_PANEL):
        start = max(stop - _PANEL, 0)
        corner = matrix[start:stop, start:stop]
        # Reversed both ways, the upper half is the lower one, which numpy reads and returns.
        root = np.linalg.cholesky(corner[::-1, ::-1].astype(np.float64))[::-1, ::-1]
        corner[:] = root
        matrix[start:stop, :start] = 0
        above = matrix[:start, start:stop]
        above[:] = above @ np.linalg.inv(root).T.astype(matrix.dtype)
        for begin in range(0, start, _UPDATE):
            end = min(begin + _UPDATE, start)
            matrix[:end, begin:end] -= multiply(above[:end], above[begin:end].T)


def _match(weight: F32, hessian: F32, cross: F32 | None, deficit: F32 | None, damp: F32) -> F32:
    """(W C + B + W D) (H + D)^-1, B the deficit and D the damping, which is on both sides, so that inputs that say
    nothing leave the weights alone. In float64, in the memory of two Hessians: numpy's `solve` would take five."""
    wanted = products().product(weight, hessian if cross is None else cross)
    wanted += weight * damp
    if deficit is not None:
        wanted += deficit
    factor = hessian.astype(np.float64)
    factor[np.diag_indices(len(factor))] = hessian.diagonal() + damp
    factorize(factor)
    x = wanted.T.astype(np.float64, order="C")
    del wanted
    width, blocks = len(factor), [slice(k, k + _PANEL) for k in range(0, len(factor), _PANEL)]
    for block in reversed(blocks):  # R y = b, from below
        later = slice(block.stop, width)
        x[block] = np.linalg.inv(factor[block, block]) @ (x[block] - factor[block, later] @ x[later])
    for block in blocks:  # R^T x = y
        x[block] = np.linalg.inv(factor[block, block]).T @ (
            x[block] - factor[: block.start, block].T @ x[: block.start]
        )
    matched: F32 = x.astype(np.float32).T
    return matched


def _damped(hessian: F32, damp: F32) -> F32:
    damped = hessian.copy()
    damped[np.diag_indices(len(damped))] += damp
    return damped


def _quantize(state: _State, factor: F32) -> None:
    """GPTQ of a state whose columns are in the order of the factor R, which is overwritten."""
    width, group, error = len(factor), state.group, state.error
    diagonal = np.diagonal(factor).copy()
    cost = np.square(diagonal)
    factor /= diagonal
    span = max(_SPAN // group, 1) * group
    for begin in range(0, width, span):
        end = min(begin + span, width)
        carried = products().product(factor[:begin, begin:end].T, error[:begin])
        for start in range(begin, end, group):
            whole = slice(start, start + group)
            taken = carried[start - begin : start - begin + group]
            taken += factor[begin:start, whole].T @ error[begin:start]
            _choose_scale(state, start, taken, factor[whole, whole], cost[whole])
            _quantize_group(state, start, taken, factor[whole, whole], cost[whole])


def _choose_scale(state: _State, start: int, carried: F32, feedback: F32, cost: F32) -> None:
    """The group's scale and zero for the values that are best once all columns before it are rounded."""
    values = state.target[start : start + state.group]
    if start:
        values = values + np.linalg.inv(feedback.T.astype(np.float64)).astype(np.float32) @ carried
    groups = np.ascontiguousarray(values.T)[:, None]
    scale, zero = choose_scales(groups, (cost / cost.mean())[None], state.scheme)
    number = start // state.group
    state.scale[number], state.zero[number] = scale[:, 0], zero[:, 0]


def _quantize_group(state: _State, start: int, carried: F32, feedback: F32, cost: F32) -> None:
    """Codes and errors of a group, block by block; `carried` is overwritten."""
    number = start // state.group
    # Several blocks must share their scale.
    factors = _FACTORS if state.size == state.group and state.scheme.bits < 8 else _FACTORS[:1]
    for first in range(0, state.group, state.size):
        here, there = slice(first, first + state.size), slice(start + first, start + first + state.size)
        carried[here] += feedback[:first, here].T @ state.error[start : start + first]
        quantize_columns(
            state.target[there],
            carried[here],
            np.ascontiguousarray(feedback[here, here]),
            cost[here],
            state.scale[number],
            state.zero[number],
            factors,
            state.grid.split,
            state.grid.low,
            state.grid.top,
            state.codes[there],
            state.error[there],
        )


def _sweep(state: _State, hessian: F32, damp: F32) -> int:
    """One sweep over all columns; how many codes and scales changed."""
    changed, width, error = 0, len(hessian), state.error
    span = max(_SPAN // state.size, 1) * state.size
    for begin in range(0, width, span):
        end = min(begin + span, width)
        gradient = products().product(hessian[begin:end], error)
        for start in range(begin, end, state.size):
            block, later = slice(start, start + state.size), slice(start + state.size, end)
            before = error[block].copy()
            moved = _sweep_block(
                state, block, gradient[start - begin :][: state.size], hessian[block, block], damp[block]
            )
            if moved:
                gradient[later.start - begin :] += hessian[later, block] @ (error[block] - before)
            changed += moved
    return changed


def _sweep_block(state: _State, block: slice, gradient: F32, hessian: F32, damp: F32) -> int:
    """The part of a sweep that needs no more than the block's own part of the Hessian."""
    group = block.start // state.group
    return sweep_columns(
        state.target[block],
        gradient + damp[:, None] * state.error[block],
        hessian + np.diag(damp),
        state.scale[group],
        state.zero[group],
        state.grid.split,
        state.grid.low,
        state.grid.top,
        _PASSES,
        state.size == state.group,
        state.codes[block],
        state.error[block],
    )
