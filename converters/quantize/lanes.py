"""The inner loop of a scale search, as explicit vector code.

A search asks the same of thousands of groups: under this scale, what are the codes, and what are the sums over them
from which least squares takes the best scale? Groups lie side by side as vector lanes, so that no sum runs across a
vector: every sum is taken in the order of the group's elements, and the result does not depend on the vector width of
the machine. LLVM keeps the accumulators of a plain loop in memory, since the arrays might overlap; written as vectors
they stay in registers, which makes the loop three times faster. `llvm.fma` rounds once on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 64  # groups in a tile
_WIDTH = 16  # elements of an LLVM vector, which splits it where the machine's are narrower
_TOGETHER = 2  # vectors in flight: enough to hide the latency of the sums, few enough for 16 registers
_ROUND = 12582912.0  # 1.5 * 2**23: adding and subtracting it rounds below 2**22 to an integer, half to even

_FLOAT = ir.FloatType()
_INDEX = ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, _WIDTH)


# numba hands over its own objects, which have no types: Any.
@intrinsic
def try_scale(typing: Any, size: Any, x: Any, inverse: Any, low: Any, high: Any, tried: Any, best: Any) -> Any:
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


@intrinsic
def try_scale_weighted(
    typing: Any, size: Any, x: Any, weight: Any, inverse: Any, low: Any, high: Any, tried: Any, best: Any
) -> Any:
    """try_scale with the products of each element weighted by weight f32[size]."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        x, weight, *lanes, best = _pointers(context, builder, signature, arguments)
        _emit(builder, arguments[0], x, weight, lanes, best)
        return context.get_dummy_value()

    return types.void(types.int64, x, weight, inverse, low, high, tried, best), codegen


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
        grids = [[_load(builder, each, lane) for each in grid] for lane in lanes]
        sums = _emit_sums(builder, size, x, weight, lanes, grids)
        for lane, (product, square) in zip(lanes, sums, strict=True):
            positive = builder.fcmp_ordered(">", square, _splat(0.0))
            scale = builder.select(positive, builder.fdiv(product, square), _splat(0.0))
            found = builder.fmul(scale, product), scale, _load(builder, tried, lane)
            offsets = [builder.add(lane, _index(row * LANES)) for row in range(len(found))]
            before = [_load(builder, best, offset) for offset in offsets]
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
        value = _load(builder, x, builder.add(row, lane))
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
    code = builder.fsub(_fma(builder, value, inverse, _splat(_ROUND)), _splat(_ROUND))
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


def _load(builder: ir.IRBuilder, pointer: ir.Value, offset: ir.Value) -> ir.Value:
    return builder.load(_at(builder, pointer, offset), align=4)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{_WIDTH}f32"), [a, b, c])
