"""Pass: scale the columns of matrices and undo it in whatever computes their inputs. The model computes the same.

    x = norm(h) * g;  W x      ->     x' = norm(h) * (g / s);  (W * s) x'         s f32[in], positive

What it is for: a column whose inputs are large may be worth a larger part of its group's range (quantize.awq).

1. The inputs of a Linear can be scaled where they are proportional, one by one, to rows of earlier weights: the
   elements of an RmsNorm, the up half of a SwiGlu's Linear, the v part of an Attention's. Query heads that share k and
   v read the same row of v, so their columns get the same scale.
2. Nothing else may read those inputs or use those weights; nor may anything else use the matrices: a head tied to the
   embedding stays as it is.
3. Weights are scaled in float32 while they are read; what the graph says of them, roles and schemes, stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from converters.checkpoint import TensorSource
from converters.graph import Graph, Node, Weight
from converters.ops import Attention, Linear, RmsNorm, SwiGlu
from converters.quantize.kernels import widen
from converters.quantize.tensor import F32, FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class ScaledSource:
    """Another source's tensor in float32, times a factor a row and, for matrices, a factor a column.

    rows: f32[shape[0]]; columns: f32[shape[1]], or None where there are none to scale.
    """

    base: TensorSource
    rows: F32
    columns: F32 | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def location(self) -> tuple[str, int]:
        return self.base.location

    def read(self, start: int, stop: int) -> FloatArray:
        values, _ = widen(self.base.read(start, stop))
        factors = self.rows[start:stop].reshape(-1, *[1] * (len(self.shape) - 1))
        scaled: F32 = values * factors
        if self.columns is not None:
            scaled *= self.columns
        return scaled


@dataclass(frozen=True, slots=True, eq=False)
class Producer:
    """What a Linear's inputs are proportional to: input j to row rows[j] of the weights stacked along their first axis.

    rows: i64[in]
    """

    weights: tuple[str, ...]
    rows: NDArray[np.int64]


def producer_of(graph: Graph, linear: Node) -> Producer | None:
    """What to divide where the columns of a Linear's weights are multiplied; None where rules 1 and 2 forbid it."""
    source = _only_source(graph, linear)
    if source is None or not isinstance(linear.op, Linear) or not _alone(graph, linear):
        return None
    width = graph.weights[linear.op.weights[0]].shape[1]
    if isinstance(source.op, RmsNorm):
        return Producer(source.op.weights, np.arange(width)) if _alone(graph, source) else None
    stacked = _only_source(graph, source)
    if stacked is None or not isinstance(stacked.op, Linear) or not _alone(graph, stacked):
        return None
    if isinstance(source.op, SwiGlu):  # [gate | up]
        return Producer(stacked.op.weights, width + np.arange(width))
    if isinstance(source.op, Attention):  # [q | k | v]
        heads, kv_heads, dim = source.op.num_heads, source.op.num_kv_heads, source.op.head_dim
        v = (heads + kv_heads + np.arange(heads) // (heads // kv_heads)) * dim  # of each head, its first row
        return Producer(stacked.op.weights, (v[:, None] + np.arange(dim)).reshape(-1))
    return None


def fold_scales(graph: Graph, scales: Mapping[str, F32]) -> Graph:
    """A graph that computes the same with the columns of the named Linears' weights multiplied by f32[in].

    Every node named has a producer_of; its scales are positive, and equal where they share a row of it.
    """
    nodes = {node.name: node for node in graph.nodes}
    rows = {name: np.ones(weight.shape[0], np.float32) for name, weight in graph.weights.items()}
    columns: dict[str, F32] = {}
    for name, scale in scales.items():
        linear = nodes[name]
        producer = producer_of(graph, linear)
        assert producer is not None, name
        columns |= dict.fromkeys(linear.op.weights, scale.astype(np.float32))
        stacked = np.ones(sum(graph.weights[each].shape[0] for each in producer.weights), np.float32)
        stacked[producer.rows] = 1 / scale
        assert (scale > 0).all() and np.array_equal(stacked[producer.rows], 1 / scale), name
        first = 0
        for each in producer.weights:
            rows[each] = rows[each] * stacked[first : first + len(rows[each])]
            first += len(rows[each])

    def change(weight: Weight) -> Weight:
        if weight.name not in columns and (rows[weight.name] == 1).all():
            return weight
        return replace(weight, source=ScaledSource(weight.source, rows[weight.name], columns.get(weight.name)))

    return graph.map_weights(change)


def _only_source(graph: Graph, node: Node) -> Node | None:
    """The node that computes a node's one input, if no other reads it."""
    if len(node.inputs) != 1 or sum(node.inputs[0] in each.inputs for each in graph.nodes) > 1:
        return None
    return next((each for each in graph.nodes if each.name == node.inputs[0]), None)


def _alone(graph: Graph, node: Node) -> bool:
    """Whether a node's weights are used by no other."""
    return all(len(list(graph.consumers(name))) == 1 for name in node.op.weights)
