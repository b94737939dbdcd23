"""The context that a model is converted for, and what it computes by it."""

from __future__ import annotations

from dataclasses import replace

from converters.graph import Graph, Node
from converters.ops import Attention


def for_context(graph: Graph, context: int) -> Graph:
    """The graph for sequences of up to `context` tokens: LongRoPE's factors follow from it (`Rope.for_context`)."""

    def change(node: Node) -> Node:
        if not isinstance(node.op, Attention) or node.op.rope is None:
            return node
        return replace(node, op=replace(node.op, rope=node.op.rope.for_context(context)))

    config = replace(graph.config, rope=graph.config.rope.for_context(context))
    return replace(graph, config=config, nodes=tuple(map(change, graph.nodes)))
