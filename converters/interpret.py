"""Runs a Graph in numpy, float32: the reference that every artifact is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.graph import LOGITS, TOKEN_IDS, Graph, Node, Weight
from converters.ops import OPS, Rows
from converters.quantize.kernels import widen
from converters.quantize.tensor import F32


@dataclass(frozen=True, slots=True)
class WeightRows:
    """The checkpoint's own numbers, whatever the weight's scheme, read as they are asked for."""

    weight: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def __getitem__(self, rows: slice) -> F32:
        start, stop, _ = rows.indices(self.weight.shape[0])
        return widen(self.weight.source.read(start, stop))[0]


def by_reference(node: Node, inputs: Sequence[np.ndarray], weights: Sequence[Rows]) -> F32:
    """The node's value by its operation's reference."""
    return OPS[type(node.op)].reference(node.op, inputs, weights)


def interpret(
    graph: Graph,
    token_ids: NDArray[np.int64],
    read: Callable[[Weight], Rows] = WeightRows,
    stop_at: str = LOGITS,
    observe: Callable[[Node, Sequence[np.ndarray]], None] = lambda node, inputs: None,
    evaluate: Callable[[Node, Sequence[np.ndarray], Sequence[Rows]], F32] = by_reference,
) -> F32:
    """Logits f32[batch, length, vocab] for token_ids i64[batch, length], or the value named `stop_at`.

    Rows of weights are read as they are needed and let go at once: memory holds the live activations. `read`
    chooses the numbers: the checkpoint's, or dequantized ones to see what a scheme costs. `observe` is shown every node
    with its inputs, which it must not change. `evaluate` computes a node: another than the reference's, for who keeps
    something between calls.
    """
    values: dict[str, np.ndarray] = {TOKEN_IDS: token_ids}
    last_use = graph.last_uses()
    for index, node in enumerate(graph.nodes):
        inputs = [values[name] for name in node.inputs]
        observe(node, inputs)
        weights = [read(graph.weights[name]) for name in node.op.weights]
        values[node.name] = evaluate(node, inputs, weights)
        if node.name == stop_at:
            break
        del inputs, weights  # or they would still be held while the next node's are read
        for name in set(node.inputs):
            if last_use[name] == index:
                del values[name]
    return values[stop_at]
