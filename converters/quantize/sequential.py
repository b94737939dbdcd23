"""Quantizes a model while it reads calibration text: every layer is shown what the quantized layers before it compute.

The nodes of the graph run once, in order, over all sequences. At a Linear, the products of its inputs are summed into
the Hessian of its squared output error, H = X X^T; its weights are quantized under it, and what they became computes
the inputs of everything that follows (Frantar et al. 2022, arXiv 2210.17323, section 4). Beside it runs the float
model: a layer is fitted to what it computed there, on inputs that are what they are here
(Li et al. 2025, arXiv 2504.02692), and one whose output is added to the residual stream makes up for what that lacks.

Memory holds the codes of one node's matrices and their Hessian; never the model, and what it computes on all tokens as
far as there is room (stream.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from converters.arrays import products
from converters.graph import TOKEN_IDS, Graph, Node, Weight
from converters.interpret import WeightRows
from converters.ops import Add, Embedding, Linear, Rows
from converters.quantize.importance import importance_at
from converters.quantize.stream import MULTIPLIED, Store, Stream, Value, steps
from converters.quantize.tensor import F32, QuantTensor


@dataclass(frozen=True, slots=True)
class Moments:
    """What quantize_gptq is told of a matrix, means over tokens: hessian, cross f32[in, in], deficit f32[out, in]."""

    hessian: F32
    cross: F32 | None = None
    deficit: F32 | None = None


Fit = Callable[[Weight, Moments], QuantTensor]
"""A weight and its moments -> what all of it is quantized to."""

_READ = "calibration text"


@dataclass(frozen=True, slots=True)
class _CodeRows:
    """A quantized matrix that is widened where it is needed."""

    tensor: QuantTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def __getitem__(self, rows: slice) -> F32:
        codes, scale, zero = self.tensor.codes, self.tensor.scale, self.tensor.zero
        part = QuantTensor(codes[rows], scale[rows], None if zero is None else zero[rows], self.tensor.bits)
        return part.dequantize()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far quantize_sequentially is: the index of the next node, the values that it and later ones need, and what
    was found up to it. `floats` are those of the float model, if there is one beside."""

    index: int
    quantized: Mapping[str, Value]
    floats: Mapping[str, Value]
    importance: Mapping[str, F32]


def fittable(graph: Graph) -> list[Weight]:
    """The weights that a fit may quantize: matrices of an integer scheme that Linears use."""
    used = (graph.weights[name] for node in graph.nodes if isinstance(node.op, Linear) for name in node.op.weights)
    return [weight for weight in used if weight.scheme.is_integer]


def float_hessians(
    graph: Graph, token_ids: NDArray[np.int64], store: Store | None = None
) -> Iterator[tuple[Node, F32]]:
    """Every Linear and the second moments f32[in, in] of its inputs in the float model, means over token_ids
    i64[sequences, length]. ModelError names the node where they are not finite; OSError if the store's disk is full."""
    last_use = graph.last_uses()
    store = store or Store()
    with Stream(store, {TOKEN_IDS: store.put(token_ids)}) as stream:
        for index, node in enumerate(graph.nodes):
            if isinstance(node.op, Linear):
                hessian = _moments(node, stream, None, None).hessian
                importance_at(node, np.diagonal(hessian), _READ)
                yield node, hessian
            if index < len(graph.nodes) - 1:
                stream.run(node, [WeightRows(graph.weights[name]) for name in node.op.weights])
                stream.forget({name for name in node.inputs if last_use[name] == index})


def quantize_sequentially(
    graph: Graph,
    token_ids: NDArray[np.int64],
    fit: Fit | None = None,
    advance: Callable[[int], None] = lambda elements: None,
    observe: Callable[[Node, NDArray[np.float64]], None] = lambda node, square: None,
    store: Store | None = None,
    begin: Progress | None = None,
    reached: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, F32]:
    """Fit every fittable matrix on token_ids i64[sequences, length]; none without `fit`.

    Returns the importance f32[in] of the columns of every matrix of a Linear, by name, fitted or not. `advance` is
    called with the number of elements of a Linear's matrices when all of them are done, `observe` with every Linear
    that is not fitted and the mean squares f64[in] of its inputs. Values lie in `store`, one of its own if there is
    none. `reached` is shown the progress after each block, which must be done with it when it returns; `begin` is such
    a progress, its values in the store, from which to go on: whoever kept it has what was fitted by then.

    ModelError names the node where the model's values are not finite; OSError if the store's disk is full.
    """
    last_use = graph.last_uses()
    fitted = {weight.name for weight in fittable(graph)} if fit else set()
    store = store or Store()
    if begin is None:
        first = {TOKEN_IDS: store.put(token_ids)}
        begin = Progress(0, first, {TOKEN_IDS: store.put(token_ids)} if fitted else {}, {})
    embedded = {name for node in graph.nodes if isinstance(node.op, Embedding) for name in node.op.weights}
    addends = _addends(graph)
    importance = dict(begin.importance)
    advance(sum(_elements(graph, node) for node in graph.nodes[: begin.index] if isinstance(node.op, Linear)))
    with Stream(store, begin.quantized) as quantized, Stream(store, begin.floats) as beside:
        floats = beside if fitted else None
        for index, node in enumerate(graph.nodes[begin.index :], begin.index):
            stored: dict[str, Rows] = {name: WeightRows(graph.weights[name]) for name in node.op.weights}
            used = stored
            if isinstance(node.op, Linear):
                if fit and not fitted.isdisjoint(stored):
                    # A tied embedding is not changed to match the head's outputs: its rows are inputs as well.
                    matched = None if not embedded.isdisjoint(stored) else floats
                    moments = _moments(node, quantized, matched, addends.get(node.name))
                    square: NDArray[np.floating] = np.diagonal(moments.hessian)
                    counts = importance_at(node, square, _READ)
                    used = {**stored, **_fitted(graph, node, moments, fit, fitted)}
                    del moments, square
                else:
                    squares = _mean_squares(quantized.values[node.inputs[0]])
                    counts = importance_at(node, squares, _READ)
                    observe(node, squares)
                importance |= dict.fromkeys(stored, counts)
                advance(_elements(graph, node))
            if index == len(graph.nodes) - 1:
                break
            for stream, weights in ((quantized, used), (floats, stored)):
                if stream:
                    stream.run(node, list(weights.values()))
                    stream.forget({name for name in node.inputs if last_use[name] == index})
            if node.layer != graph.nodes[index + 1].layer:
                reached(Progress(index + 1, quantized.values, floats.values if floats else {}, importance))
    return importance


def _elements(graph: Graph, node: Node) -> int:
    return sum(math.prod(graph.weights[name].shape) for name in node.op.weights)


def _addends(graph: Graph) -> dict[str, str]:
    """By the name of a value that is added to another: the other."""
    sums = [node.inputs for node in graph.nodes if isinstance(node.op, Add)]
    return {name: other for left, right in sums for name, other in ((left, right), (right, left))}


def _moments(node: Node, quantized: Stream, floats: Stream | None, addend: str | None) -> Moments:
    """Of a Linear's inputs; of what its output is added to, if that is known already."""
    x = quantized.values[node.inputs[0]]
    hessian, cross, deficit = _Mean(), _Mean(), _Mean()
    for start, stop in steps(x.shape, MULTIPLIED):
        inputs = _rows(x.read(start, stop))
        hessian.add(inputs, inputs)
        if floats is not None:
            cross.add(_rows(floats.values[node.inputs[0]].read(start, stop)), inputs)
            if addend in quantized.values:
                lacking = floats.values[addend].read(start, stop) - quantized.values[addend].read(start, stop)
                deficit.add(_rows(lacking), inputs)
    found = hessian.value()
    assert found is not None
    return Moments(found, cross.value(), deficit.value())


class _Mean:
    """The mean over rows of the products of two arrays f32[rows, a] and f32[rows, b]: f32[a, b]."""

    def __init__(self) -> None:
        self.rows = 0
        self.sum: F32 | None = None

    def add(self, a: F32, b: F32) -> None:
        """More of their rows."""
        product = products().product(a.T, b)
        if self.sum is None:
            self.sum = product
        else:
            self.sum += product
        self.rows += len(a)

    def value(self) -> F32 | None:
        """None if there were no rows. To be asked once."""
        if self.sum is not None:
            self.sum /= np.float32(self.rows)
        return self.sum


def _fitted(graph: Graph, node: Node, moments: Moments, fit: Fit, names: Collection[str]) -> dict[str, Rows]:
    """What those of a Linear's weights that have these names are quantized to; each makes up for its own rows."""
    found: dict[str, Rows] = {}
    start = 0
    for name in node.op.weights:
        weight = graph.weights[name]
        stop = start + weight.shape[0]
        if name in names:
            deficit = None if moments.deficit is None else moments.deficit[start:stop]
            found[name] = _CodeRows(fit(weight, replace(moments, deficit=deficit)))
        start = stop
    return found


def _mean_squares(value: Value) -> NDArray[np.float64]:
    """f64[features] of f32[sequences, length, features]."""
    squares = np.zeros(value.shape[-1])
    for k in range(len(value)):
        squares += np.square(value.read(k, k + 1)[0], dtype=np.float64).sum(axis=0)
    means: NDArray[np.float64] = squares / (value.shape[0] * value.shape[1])
    return means


def _rows(value: np.ndarray) -> F32:
    return value.reshape(-1, value.shape[-1])
