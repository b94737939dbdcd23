"""How much each input column of a matrix matters, measured without any text.

The interpreter runs the model on uniformly random token ids and takes the mean square of every Linear's input, column
by column. Random tokens are no language, but the channels that a model drives hard are the same for any input, and they
are what round-to-nearest gets wrong: llama.cpp's importance matrix does the same with text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from converters.errors import NotFiniteError
from converters.graph import Graph, Node
from converters.interpret import interpret
from converters.ops import Linear
from converters.quantize.tensor import F32

# Part of the mean that every column gets at least, so that one which random tokens leave silent keeps its numbers.
_FLOOR = 0.01


def importance_of(square: NDArray[np.floating]) -> F32:
    """Importance f32[in] of columns from the mean squares of what comes in: mean 1, and a small floor.

    Columns of a layer that gets only zeros, since another was pruned, matter alike. The mean squares are taken as
    float32 holds them, as importance matrices of llama.cpp do, so that both come to the same.
    """
    square = square.astype(np.float32)
    mean = square.mean(dtype=np.float64)
    importance: F32 = (square / mean + _FLOOR if mean else np.ones_like(square)).astype(np.float32)
    return importance


def importance_at(node: Node, square: NDArray[np.floating], read: str) -> F32:
    """Importance f32[in] of the columns that come into a node. ModelError names it if their mean squares
    are not finite in float32; `read` is what the model was shown."""
    _require_finite(node, square, read)
    return importance_of(square)


def _require_finite(node: Node, square: NDArray[np.floating], read: str) -> None:
    with np.errstate(over="ignore"):
        finite = np.isfinite(square.astype(np.float32)).all()
    if not finite:
        raise NotFiniteError(
            f"the model computes no finite values on {read}",
            where=f"input of {node.name}",
            found="NaN, Inf or squares beyond float32",
            mend="The checkpoint is damaged: download it again or use another.",
        )


def random_token_importance(graph: Graph, tokens: int, seed: int) -> dict[str, F32]:
    """Importance f32[in] of each matrix that a Linear uses, by weight name, with mean 1 and a small floor.

    ModelError names the node if the model's values are not finite.
    """
    squares = random_token_squares(graph, tokens, seed)
    return {name: importance_of(square) for name, square in squares.items()}


def random_token_squares(graph: Graph, tokens: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """Mean squares f64[in] of each matrix's inputs, by weight name. ModelError as random_token_importance."""
    token_ids = np.random.default_rng(seed).integers(0, graph.config.vocab_size, (1, tokens))
    squares: dict[str, NDArray[np.float64]] = {}

    def observe(node: Node, inputs: Sequence[np.ndarray]) -> None:
        if not isinstance(node.op, Linear):
            return
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        square: NDArray[np.float64] = np.mean(np.square(rows, dtype=np.float64), axis=0)
        _require_finite(node, square, "random tokens")
        squares.update(dict.fromkeys(node.op.weights, square))

    head = graph.nodes[-1]
    observe(head, [interpret(graph, token_ids, stop_at=head.inputs[0], observe=observe)])
    return squares
