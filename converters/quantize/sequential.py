"""Quantizes a model while it reads calibration text: every layer is shown what the quantized layers before it compute.

The nodes of the graph run once, in order, over all sequences. At a Linear, the products of its inputs are summed into
the Hessian of its squared output error, H = X X^T; its weights are quantized under it, and what they became computes
the inputs of everything that follows (Frantar et al. 2022, arXiv 2210.17323, section 4). Beside it runs the float
model: a layer is fitted to what it computed there, on inputs that are what they are here
(Li et al. 2025, arXiv 2504.02692), and one whose output is added to the residual stream makes up for what that lacks.

Memory holds the activations of one stretch of nodes for all tokens, the codes of one node's matrices and their Hessian;
never the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from converters.graph import TOKEN_IDS, Graph, Node, Weight
from converters.interpret import WeightRows
from converters.ops import OPS, Add, Embedding, Linear, Rows
from converters.quantize.importance import importance_at
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


@dataclass(slots=True)
class _Stream:
    """The values of a model that are still needed, f32[sequences, length, features] by name."""

    values: dict[str, np.ndarray]

    def run(self, node: Node, weights: Sequence[Rows]) -> None:
        """Compute a node's value; one sequence at a time where a whole batch would need as much memory again."""
        inputs = [self.values[name] for name in node.inputs]
        reference = OPS[type(node.op)].reference
        if isinstance(node.op, Linear | Embedding):
            self.values[node.name] = reference(node.op, inputs, weights)
            return
        parts = (reference(node.op, [value[k : k + 1] for value in inputs], weights) for k in range(len(inputs[0])))
        first = next(parts)
        out = np.empty((len(inputs[0]), *first.shape[1:]), np.float32)
        out[:1] = first
        for k, part in enumerate(parts, 1):
            out[k : k + 1] = part
        self.values[node.name] = out

    def forget(self, names: Iterable[str]) -> None:
        """Values that no later node needs."""
        for name in names:
            del self.values[name]


def fittable(graph: Graph) -> list[Weight]:
    """The weights that a fit may quantize: matrices of an integer scheme that Linears use."""
    used = (graph.weights[name] for node in graph.nodes if isinstance(node.op, Linear) for name in node.op.weights)
    return [weight for weight in used if weight.scheme.is_integer]


def float_hessians(graph: Graph, token_ids: NDArray[np.int64]) -> Iterator[tuple[Node, F32]]:
    """Every Linear and the second moments f32[in, in] of its inputs in the float model, means over token_ids
    i64[sequences, length]. ModelError names the node where they are not finite."""
    last_use = graph.last_uses()
    stream = _Stream({TOKEN_IDS: token_ids})
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
) -> dict[str, F32]:
    """Fit every fittable matrix on token_ids i64[sequences, length]; none without `fit`.

    Returns the importance f32[in] of every Linear's columns, by weight name, for weights that are not fitted. `advance`
    is called with the number of elements of each matrix that is done, `observe` with every Linear that is not fitted
    and the mean squares f64[in] of its inputs. ModelError names the node where the model's values are not finite.
    """
    last_use = graph.last_uses()
    fitted = {weight.name for weight in fittable(graph)} if fit else set()
    quantized = _Stream({TOKEN_IDS: token_ids})
    floats = _Stream({TOKEN_IDS: token_ids}) if fitted else None
    embedded = {name for node in graph.nodes if isinstance(node.op, Embedding) for name in node.op.weights}
    addends = _addends(graph)
    importance: dict[str, F32] = {}
    for index, node in enumerate(graph.nodes):
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
            advance(sum(rows.shape[0] * rows.shape[1] for rows in stored.values()))
        if index == len(graph.nodes) - 1:
            break
        for stream, weights in ((quantized, used), (floats, stored)):
            if stream:
                stream.run(node, list(weights.values()))
                stream.forget({name for name in node.inputs if last_use[name] == index})
    return importance


def _addends(graph: Graph) -> dict[str, str]:
    """By the name of a value that is added to another: the other."""
    sums = [node.inputs for node in graph.nodes if isinstance(node.op, Add)]
    return {name: other for left, right in sums for name, other in ((left, right), (right, left))}


def _moments(node: Node, quantized: _Stream, floats: _Stream | None, addend: str | None) -> Moments:
    """Of a Linear's inputs; of what its output is added to, if that is known already."""
    x = _rows(quantized.values[node.inputs[0]])
    hessian = _mean_product(x, x)
    if floats is None:
        return Moments(hessian)
    cross = _mean_product(_rows(floats.values[node.inputs[0]]), x)
    if addend not in quantized.values:
        return Moments(hessian, cross)
    return Moments(hessian, cross, _mean_product(_rows(floats.values[addend] - quantized.values[addend]), x))


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


def _mean_squares(value: np.ndarray) -> NDArray[np.float64]:
    """f64[features] of f32[sequences, length, features]."""
    squares = np.zeros(value.shape[-1])
    for sequence in value:
        squares += np.square(sequence, dtype=np.float64).sum(axis=0)
    means: NDArray[np.float64] = squares / (value.shape[0] * value.shape[1])
    return means


def _rows(value: np.ndarray) -> F32:
    return value.reshape(-1, value.shape[-1])


def _mean_product(a: F32, b: F32) -> F32:
    product: F32 = a.T @ b
    product /= np.float32(len(a))
    return product
