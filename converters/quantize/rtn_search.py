"""The scale searches of rtn.py, as kernels over vectors of groups.

A search asks the same of thousands of groups: under this scale, what are the codes, and what are the sums over them
from which least squares takes the best scale? Groups lie side by side as vector lanes, so that no sum runs across a
vector: every sum is taken in the order of the group's elements, and the result does not depend on the vector width of
the machine. LLVM keeps the accumulators of a plain loop in memory, since the arrays might overlap; written as vectors
they stay in registers, which makes the loop three times faster. `llvm.fma` rounds once on every machine.

Kernels and what they are made of share this file, because numba's cache looks for changes in a kernel's own file only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from converters.quantize.tensor import F32, U8

LANES = 64  # groups in a tile
_WIDTH = 16  # elements of an LLVM vector, which splits it where the machine's are narrower
_TOGETHER = 4  # vectors in flight: enough to hide the latency of the sums
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds below 2**22 to an integer, half to even
_TINY = np.float32(1e-30)  # far below what an fp16 scale can hold; the inverse of less overflows float32
_INFINITE = np.float32(np.inf)

_FLOAT = ir.FloatType()
_INDEX = ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, _WIDTH)


# numba hands over its own objects, which have no types: Any.
def _try_scale(typing: Any, size: Any, x: Any, inverse: Any, low: Any, high: Any, tried: Any, best: Any) -> Any:
    """Where an inverse scale leaves less error than all before it, keep its least-squares scale and what was tried.

    The codes are u = clamp(round(x * inverse), low, high); best f32[3, LANES] holds <x, u>^2 / <u, u>, <x, u> / <u, u>
    and `tried` of the codes with the largest of the first. size int64 > 0; x f32[size, LANES]; inverse, low, high and
    tried f32[LANES]; all arrays C-ordered.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        x, *lanes, best = _pointers(context, builder, signature, arguments)
        _emit(builder, arguments[0], x, None, lanes, best)
        return context.get_dummy_value()

    return types.void(types.int64, x, inverse, low, high, tried, best), codegen


def _try_scale_weighted(
    typing: Any, size: Any, x: Any, weight: Any, inverse: Any, low: Any, high: Any, tried: Any, best: Any
) -> Any:
    """_try_scale with the products of each element weighted by weight f32[size]."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        x, weight, *lanes, best = _pointers(context, builder, signature, arguments)
        _emit(builder, arguments[0], x, weight, lanes, best)
        return context.get_dummy_value()

    return types.void(types.int64, x, weight, inverse, low, high, tried, best), codegen


# numba gives an intrinsic's caller all but the first argument.
try_scale = cast("Callable[[int, F32, F32, F32, F32, F32, F32], None]", intrinsic(_try_scale))
try_scale_weighted = cast("Callable[[int, F32, F32, F32, F32, F32, F32, F32], None]", intrinsic(_try_scale_weighted))


def _pointers(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> list[ir.Value]:
    """The data of every argument after the size."""
    arrays = (
        context.make_array(kind)(context, builder, value)
        for kind, value in zip(signature.args[1:], arguments[1:], strict=True)
    )
    return [builder.bitcast(array.data, ir.PointerType(_FLOAT)) for array in arrays]


def _emit(
    builder: ir.IRBuilder,
    size: ir.Value,
    x: ir.Value,
    weight: ir.Value | None,
    rows: Sequence[ir.Value],
    best: ir.Value,
) -> None:
    """rows: inverse, low, high, tried."""
    *grid, tried = rows
    for first in range(0, LANES, _WIDTH * _TOGETHER):
        lanes = [_index(first + _WIDTH * k) for k in range(_TOGETHER)]
        grids = [[_vector(builder, each, lane) for each in grid] for lane in lanes]
        sums = _emit_sums(builder, size, x, weight, lanes, grids)
        for lane, (product, square) in zip(lanes, sums, strict=True):
            positive = builder.fcmp_ordered(">", square, _splat(0.0))
            scale = builder.select(positive, builder.fdiv(product, square), _splat(0.0))
            found = builder.fmul(scale, product), scale, _vector(builder, tried, lane)
            offsets = [builder.add(lane, _index(row * LANES)) for row in range(len(found))]
            before = [_vector(builder, best, offset) for offset in offsets]
            better = builder.fcmp_ordered(">", found[0], before[0])
            for offset, new, old in zip(offsets, found, before, strict=True):
                builder.store(builder.select(better, new, old), _at(builder, best, offset), align=4)


def _emit_sums(
    builder: ir.IRBuilder,
    size: ir.Value,
    x: ir.Value,
    weight: ir.Value | None,
    lanes: Sequence[ir.Value],
    grids: Sequence[Sequence[ir.Value]],
) -> list[tuple[ir.Value, ir.Value]]:
    """The loop over a group's elements: (<x, u>, <u, u>) for each vector of lanes."""
    before, loop, after = builder.block, builder.append_basic_block("sum"), builder.append_basic_block("summed")
    builder.branch(loop)
    builder.position_at_end(loop)
    element = builder.phi(_INDEX)
    sums = [(builder.phi(_VECTOR), builder.phi(_VECTOR)) for _ in lanes]
    row = builder.mul(element, _index(LANES))
    count = None if weight is None else _broadcast(builder, builder.load(builder.gep(weight, [element])))
    totals = []
    for lane, grid, (products, squares) in zip(lanes, grids, sums, strict=True):
        value = _vector(builder, x, builder.add(row, lane))
        code = _code(builder, value, *grid)
        counted = code if count is None else builder.fmul(count, code)
        totals.append((_fma(builder, value, counted, products), _fma(builder, counted, code, squares)))
        for phi, total in zip((products, squares), totals[-1], strict=True):
            phi.add_incoming(_splat(0.0), before)
            phi.add_incoming(total, loop)
    following = builder.add(element, _index(1))
    element.add_incoming(_index(0), before)
    element.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, size), loop, after)
    builder.position_at_end(after)
    return totals


def _code(builder: ir.IRBuilder, value: ir.Value, inverse: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    code = builder.fsub(_fma(builder, value, inverse, _splat(float(_ROUND))), _splat(float(_ROUND)))
    code = builder.select(builder.fcmp_ordered(">", code, low), code, low)
    return builder.select(builder.fcmp_ordered("<", code, high), code, high)


def _index(value: int) -> ir.Constant:
    return ir.Constant(_INDEX, value)


def _splat(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * _WIDTH)


def _broadcast(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    vector = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _index(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(ir.IntType(32), _WIDTH), [0] * _WIDTH))


def _at(builder: ir.IRBuilder, pointer: ir.Value, offset: ir.Value) -> ir.Value:
    return builder.bitcast(builder.gep(pointer, [offset]), ir.PointerType(_VECTOR))


def _vector(builder: ir.IRBuilder, pointer: ir.Value, offset: ir.Value) -> ir.Value:
    return builder.load(_at(builder, pointer, offset), align=4)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    function: Any = cgutils.get_or_insert_function  # untyped
    return builder.call(function(builder.module, kind, f"llvm.fma.v{_WIDTH}f32"), [a, b, c])


# ---- kernels ----
#
# A kernel's arrays: groups f32[rows, m, size]; counts f32[m, size] or None. Lanes are LANES rows' groups in the same
# columns, x f32[size, LANES]. `best` is f32[3, LANES]: the gain <w, u>^2 / <u, u>, the scale, and the candidate.


@njit(cache=True, nogil=True, error_model="numpy")
def search_symmetric(
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
def search_asymmetric(groups: F32, counts: F32 | None, spans: F32, top: int) -> tuple[F32, U8]:  # pragma: no cover
    """Positive scales f32[rows, m], infinite where the values' range is, and integer zeros u8[rows, m]."""
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
                # Of a range beyond float32 no candidate has an inverse; no finite scale spans it either.
                spanned = highest[lane] - lowest[lane] < _INFINITE
                scale[start + lane, column] = best[1, lane] if spanned else _INFINITE
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
def round_codes(groups: F32, scale: F32, zero: U8, low: int, top: int) -> U8:  # pragma: no cover
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
