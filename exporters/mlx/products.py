"""Products with an artifact's matrices where MLX computes on a CPU, in a small part of the time.

MLX's Linux wheels come with a BLAS that does 4 GFLOP/s, a quantized product that does 3, and one in fp16 that does less
than a tenth. So mlx-lm's model keeps its code and its arrays, and only `x @ matrix.T` of several rows is computed
elsewhere: the matrix is dequantized into float32, exactly as mx.dequantize does it, multiplied by numpy's BLAS, and let
go before the next one comes. The result is rounded to the type of x: that is what Apple's GPU kernels do, which add in
float32. A single row goes through mx.quantized_matmul itself, in float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from numba import njit

from converters.quantize.tensor import F32, U8

_BLOCK = 1 << 25  # numbers of a matrix in float32 at a time
_THREADS = os.cpu_count() or 1
_POOL = ThreadPoolExecutor(_THREADS)


class FastLinear(Linear):
    def __call__(self, x: mx.array) -> mx.array:
        return _with_bias(self, _product(self, x))


class FastQuantizedLinear(QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        return _with_bias(self, _quantized_product(self, x))


class FastEmbedding(Embedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return _product(self, x)


class FastQuantizedEmbedding(QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return _quantized_product(self, x)


_FAST: dict[type[Module], type[Module]] = {
    Linear: FastLinear,
    QuantizedLinear: FastQuantizedLinear,
    Embedding: FastEmbedding,
    QuantizedEmbedding: FastQuantizedEmbedding,
}


def compute_by_numpy(model: Module) -> None:
    """Give every matrix of the model the products above; its arrays stay the ones that mlx-lm has loaded."""
    for module in model.modules():  # type: ignore[no-untyped-call]  # mlx has types in part
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]


def dequantize(weight: mx.array, scales: mx.array, biases: mx.array, bits: int) -> F32:
    """f32[out, in] of MLX's affine codes of 4 or 8 bits, the numbers that mx.dequantize has in float32."""
    codes, scale, bias = np.array(weight, copy=False).view(np.uint8), _float32(scales), _float32(biases)
    values = np.empty((codes.shape[0], codes.shape[1] * 8 // bits), np.float32)
    step = -(-len(codes) // _THREADS)

    def part(start: int) -> None:
        rows = slice(start, start + step)
        _dequantize(codes[rows], scale[rows], bias[rows], bits, values[rows])

    list(_POOL.map(part, range(0, len(codes), step)))
    return values


def _with_bias(module: Module, product: mx.array) -> mx.array:
    return product + module["bias"] if "bias" in module else product


def _product(module: Module, x: mx.array) -> mx.array:
    weight = module["weight"]
    rows = max(1, _BLOCK // weight.shape[1])
    blocks = (_float32(weight[start : start + rows]) for start in range(0, weight.shape[0], rows))
    return _by_numpy(x, blocks, weight.shape[0])


def _quantized_product(module: Module, x: mx.array) -> mx.array:
    weight, scales, biases = module["weight"], module["scales"], module["biases"]
    if x.size == x.shape[-1]:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        wide = x.astype(mx.float32)
        product = mx.quantized_matmul(wide, weight, scales, biases, True, module.group_size, module.bits)
        return product.astype(x.dtype)
    mx.eval(weight, scales, biases)
    rows = max(1, _BLOCK // (weight.shape[1] * 32 // module.bits))
    parts = (slice(start, start + rows) for start in range(0, weight.shape[0], rows))
    blocks = (dequantize(weight[part], scales[part], biases[part], module.bits) for part in parts)
    return _by_numpy(x, blocks, weight.shape[0])


def _by_numpy(x: mx.array, blocks: Iterable[F32], width: int) -> mx.array:
    """x @ matrix.T of a matrix that comes in blocks of rows f32[n, in], in the type of x."""
    columns = _float32(x.reshape(-1, x.shape[-1])).T
    result = np.empty((width, columns.shape[1]), np.float32)  # this way around BLAS has one large operand to part
    start = 0
    for block in blocks:
        np.matmul(block, columns, out=result[start : start + len(block)])
        start += len(block)
    return mx.array(result).T.reshape(*x.shape[:-1], width).astype(x.dtype)


def _float32(array: mx.array) -> F32:
    """The array's numbers, without a copy where they are float32 already."""
    return np.array(array.astype(mx.float32), copy=False)


@njit(cache=True, nogil=True)
def _dequantize(codes: U8, scales: F32, biases: F32, bits: int, values: F32) -> None:  # pragma: no cover
    """values f32[rows, in] = scales * code + biases; two codes of 4 bits in a byte, the first one low."""
    rows, groups = scales.shape
    size = values.shape[1] // groups
    for row in range(rows):
        for group in range(groups):
            scale, bias, start = scales[row, group], biases[row, group], group * size
            if bits == 8:
                for i in range(start, start + size):
                    values[row, i] = scale * np.float32(codes[row, i]) + bias
            else:
                for i in range(start, start + size, 2):
                    pair = codes[row, i // 2]
                    values[row, i] = scale * np.float32(pair & 15) + bias
                    values[row, i + 1] = scale * np.float32(pair >> 4) + bias
