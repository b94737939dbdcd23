"""The graph's own promises, on a graph small enough to read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from converters.config import ModelConfig, Rope, RopeKind
from converters.errors import ModelError
from converters.graph import Graph, Node, Weight, infer_shapes
from converters.interpret import interpret
from converters.ops import Add, Embedding, Linear
from converters.quantize.scheme import FP16
from converters.role import Role
from tests.converters.arrays import ArraySource

CONFIG = ModelConfig("llama", 5, 4, 4, 1, 1, 1, 4, 1e-5, Rope(RopeKind.DEFAULT, 1e4, 4), 16, None, True, None, (), None)


TABLE = np.arange(20, dtype=np.float32).reshape(5, 4)
GRAPH = Graph(
    CONFIG,
    (
        Node("embedded", Embedding(("table",)), ("token_ids",)),
        Node("doubled", Add(), ("embedded", "embedded")),
        Node("logits", Linear(("table",)), ("doubled",)),
    ),
    {"table": Weight("table", Role.EMBEDDING, None, ArraySource(TABLE))},
    {},
)


def test_shapes_and_values() -> None:
    shapes = infer_shapes(GRAPH, 2, 3)
    assert shapes == {"token_ids": (2, 3), "embedded": (2, 3, 4), "doubled": (2, 3, 4), "logits": (2, 3, 5)}
    ids = np.array([[0, 1, 2], [4, 3, 2]])
    assert np.array_equal(interpret(GRAPH, ids), 2 * TABLE[ids] @ TABLE.T)
    assert np.array_equal(interpret(GRAPH, ids, stop_at="embedded"), TABLE[ids])


def test_map_weights_leaves_the_graph_alone() -> None:
    changed = GRAPH.map_weights(lambda weight: replace(weight, scheme=FP16))
    assert changed.weights["table"].scheme is FP16
    assert GRAPH.weights["table"].scheme is not FP16
    assert changed.nodes is GRAPH.nodes


@pytest.mark.parametrize("inputs", [("embedded",), ("embedded", "later"), ()])
def test_malformed_graph(inputs: tuple[str, ...]) -> None:
    broken = replace(GRAPH, nodes=(GRAPH.nodes[0], Node("sum", Add(), inputs)))
    with pytest.raises(ModelError, match=r"malformed graph \(sum\)"):
        infer_shapes(broken, 1, 1)
