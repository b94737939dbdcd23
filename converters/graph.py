"""The intermediate tensor graph: every exporter starts here, and nothing in it knows a file format.

A decoder-only model is a straight list of nodes in execution order. Values have names; a node reads earlier values and
writes one. Weights are named, carry a role and a scheme, and read their numbers from the checkpoint on demand.

    token_ids -> Embedding -> [ RmsNorm -> Linear(q,k,v) -> Attention -> Linear(o) -> Add
                                RmsNorm -> Linear(gate,up) -> SwiGlu -> Linear(down) -> Add ] x layers
              -> RmsNorm -> Linear(lm_head) -> logits

A Linear stacks several weights along its output axis, whether the checkpoint fuses them or not: an exporter packs them
as one matrix or as several, the numbers are the same since quantization groups run along the input axis. Tied
embeddings are explicit: the last Linear names the embedding's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from converters.checkpoint import TensorSource
from converters.config import ModelConfig
from converters.errors import ModelError
from converters.ops import OPS, Op, Shape
from converters.quantize.scheme import FP32, Scheme
from converters.role import Role

TOKEN_IDS = "token_ids"  # noqa: S105  # the name of a value, no password
LOGITS = "logits"


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter: [out, in] for matrices (the embedding is [vocab, hidden]), [hidden] for norms."""

    name: str
    role: Role
    layer: int | None
    source: TensorSource
    scheme: Scheme = FP32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. `name` is also the name of its output value."""

    name: str
    op: Op
    inputs: tuple[str, ...]
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class Graph:
    """A complete model: nodes in execution order; the last one's value is the logits.

    `dropped` names the checkpoint tensors that were left out on purpose, with the reason.
    """

    config: ModelConfig
    nodes: tuple[Node, ...]
    weights: Mapping[str, Weight]
    dropped: Mapping[str, str]

    def consumers(self, weight: str) -> Iterator[Node]:
        """The nodes that use a weight: two for a tied embedding."""
        return (node for node in self.nodes if weight in node.op.weights)

    def last_uses(self) -> dict[str, int]:
        """The index of the last node that reads a value, by the value's name: after it nobody needs it."""
        return {name: index for index, node in enumerate(self.nodes) for name in node.inputs}

    def map_weights(self, change: Callable[[Weight], Weight]) -> Graph:
        """A new graph with every weight replaced by change(weight)."""
        return replace(self, weights={name: change(weight) for name, weight in self.weights.items()})


def infer_shapes(graph: Graph, batch: int, length: int) -> dict[str, Shape]:
    """The shape of every value for token_ids [batch, length]. ModelError names the node whose rule is broken."""
    shapes: dict[str, Shape] = {TOKEN_IDS: (batch, length)}
    for node in graph.nodes:
        spec = OPS[type(node.op)]
        missing = [name for name in node.inputs if name not in shapes]
        if missing or len(node.inputs) != spec.arity:
            expected = f"{spec.arity} earlier values"
            raise ModelError("malformed graph", where=node.name, expected=expected, found=str(node.inputs))
        weights = [graph.weights[name].shape for name in node.op.weights]
        shapes[node.name] = spec.shape(node.op, [shapes[name] for name in node.inputs], weights)
    return shapes
