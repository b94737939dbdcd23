"""Activation-aware scaling: columns that are driven hard get a larger part of their group's range.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978), section 3.2: multiply the columns of a
matrix by s before quantizing and divide its inputs by s, where s = magnitude^alpha of the inputs, and search alpha for
the least error of the layer's output. passes.fold does the multiplying and dividing.

- The output error of weights off by E is tr(E H E^T), H = X^T X: no inputs are needed beside it.
- The magnitude of a column is its root mean square, the diagonal of H; the paper takes mean |x|.
- The quantizer is least squares weighted by the diagonal of H (as seen by the scaled columns). Its search of scales
  already clips ranges where that leaves less error, which is the paper's second step.
- The error is that of at most 512 rows, taken evenly from all: rows are quantized apart, so their mean tells as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from converters.arrays import products
from converters.graph import Graph
from converters.passes.fold import producer_of
from converters.quantize.block import read_rows, too_large
from converters.quantize.importance import importance_of
from converters.quantize.rtn import quantize_rtn
from converters.quantize.scheme import Scheme
from converters.quantize.sequential import float_hessians
from converters.quantize.stream import Store
from converters.quantize.tensor import F32

_STEPS = 20  # of alpha, ibid.
AWQ_ROWS = 512


def find_scales(
    graph: Graph,
    token_ids: NDArray[np.int64],
    advance: Callable[[int], None] = lambda n: None,
    store: Store | None = None,
) -> dict[str, F32]:
    """Factors f32[in] for the columns of all matrices that have few bits and can be folded, by the name of their
    Linear: what passes.fold.fold_scales takes.

    token_ids: i64[sequences, length], what the float model reads; `store` has its values. `advance` is called with the
    number of elements of matrices that are done. ModelError and OSError as float_hessians; ModelError as quantize_rows.
    """
    scales: dict[str, F32] = {}
    for node, hessian in float_hessians(graph, token_ids, store):
        weights = [graph.weights[name] for name in node.op.weights]
        producer = producer_of(graph, node)
        fewest = min(weights, key=lambda weight: weight.scheme.bits)
        if producer is not None and all(weight.scheme.is_integer for weight in weights) and fewest.scheme.bits < 8:
            values = [read_rows(weight, 0, weight.shape[0]) for weight in weights]
            try:
                scales[node.name] = awq_scales(values, hessian, fewest.scheme, producer.rows)
            except OverflowError as error:
                largest = max(zip(weights, values, strict=True), key=lambda pair: float(np.abs(pair[1]).max()))
                raise too_large(largest[0], error) from error
        advance(sum(weight.shape[0] * weight.shape[1] for weight in weights))
    return scales


def awq_scales(
    weights: Sequence[F32], hessian: F32, scheme: Scheme, producer_rows: NDArray[np.int64] | None = None
) -> F32:
    """Factors f32[in] for the columns of weights f32[out, in] that share their inputs; all 1 where none is better.

    hessian: f32[in, in], X^T X of their inputs, to any factor.
    scheme: an integer one, whose error counts.
    producer_rows: i64[in], columns of the same number get the same factor (passes.fold.Producer); None: each its own.
    OverflowError if the weights as they are do not fit fp16 scales.
    """
    rows = _some_rows(weights)
    importance = importance_of(np.diagonal(hessian))
    magnitude = np.sqrt(_mean_of_shared(importance, producer_rows))
    best = np.ones(len(importance), np.float32)
    least = output_error(rows, _round_trip(rows, best, importance, scheme), hessian)
    for step in range(1, _STEPS):
        scale = magnitude ** np.float32(step / _STEPS)
        scale /= np.sqrt(scale.max() * scale.min())  # centred, as the paper's code does: fp16 scales stay in range
        try:
            error = output_error(rows, _round_trip(rows, scale, importance, scheme), hessian)
        except OverflowError:  # a scale that drives them out of fp16's range is none to choose
            continue
        if error < least:
            best, least = scale, error
    return best


def output_error(weight: F32, quantized: F32, hessian: F32) -> float:
    """tr(E H E^T), E = quantized - weight f32[out, in]: the squared error of the outputs, summed, in units of H."""
    error = quantized - weight
    return float(np.einsum("ij,ij->", products().product(error, hessian), error, dtype=np.float64))


def _round_trip(rows: F32, scale: F32, importance: F32, scheme: Scheme) -> F32:
    """What a matrix becomes when it is quantized with its columns scaled; errors count by the unscaled inputs."""
    return quantize_rtn(rows * scale, scheme, importance / np.square(scale)).dequantize() / scale


def _some_rows(weights: Sequence[F32]) -> F32:
    stacked = np.concatenate(weights)
    if len(stacked) <= AWQ_ROWS:
        return stacked
    return np.ascontiguousarray(stacked[np.linspace(0, len(stacked) - 1, AWQ_ROWS).astype(np.int64)])


def _mean_of_shared(values: F32, group: NDArray[np.int64] | None) -> F32:
    """f32[in]: each value replaced by the mean of those in its group."""
    if group is None:
        return values
    _, index = np.unique(group, return_inverse=True)
    mean = np.bincount(index, values) / np.bincount(index)
    return mean[index].astype(np.float32)
