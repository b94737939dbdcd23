"""How much each input column of a matrix matters, measured without any text.

The interpreter runs the model on uniformly random token ids and takes the mean square of every Linear's input, column
by column. Random tokens are no language, but the channels that a model drives hard are the same for any input, and they
are what round-to-nearest gets wrong: llama.cpp's importance matrix does the same with text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from converters.errors import ModelError
from converters.graph import Graph, Node
from converters.interpret import interpret
from converters.ops import Linear
from converters.quantize.tensor import F32

# Part of the mean that every column gets at least, so that one which random tokens leave silent keeps its numbers.
_FLOOR = 0.01


def importance_of(square: NDArray[np.floating]) -> F32:
    """Importance f32[in] of columns from the mean squares of what comes in: mean 1, and a small floor.

    Columns of a layer that gets only zeros, since another was pruned, matter alike.
    """
    mean = square.mean(dtype=np.float64)
    importance: F32 = (square / mean + _FLOOR if mean else np.ones_like(square)).astype(np.float32)
    return importance


def importance_at(node: Node, square: NDArray[np.floating], read: str) -> F32:
    """Importance f32[in] of the columns that come into a node. ModelError names it if their mean squares
    are not finite; `read` is what the model was shown."""
    if not np.isfinite(square).all():
        raise ModelError(
            f"the model computes no finite values on {read}",
            where=f"input of {node.name}",
            found="NaN or Inf",
            mend="The checkpoint is damaged: download it again or use another.",
        )
    return importance_of(square)


def random_token_importance(graph: Graph, tokens: int, seed: int) -> dict[str, F32]:
    """Importance f32[in] of each matrix that a Linear uses, by weight name, with mean 1 and a small floor.

    ModelError names the node if the model's values are not finite.
    """
    token_ids = np.random.default_rng(seed).integers(0, graph.config.vocab_size, (1, tokens))
    importance: dict[str, F32] = {}

    def observe(node: Node, inputs: Sequence[np.ndarray]) -> None:
        if not isinstance(node.op, Linear):
            return
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        square = np.mean(np.square(rows, dtype=np.float64), axis=0)
        counts = importance_at(node, square, "random tokens")
        for name in node.op.weights:
            importance[name] = counts

    head = graph.nodes[-1]
    observe(head, [interpret(graph, token_ids, stop_at=head.inputs[0], observe=observe)])
    return importance
