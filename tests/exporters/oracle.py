"""What every artifact is held against: the canonical weights, and the interpreter that computes with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from converters.graph import Graph, Weight
from converters.interpret import interpret
from converters.quantize.block import dequantize, quantize_rows
from converters.quantize.tensor import F32


def canonical(weight: Weight) -> F32:
    """What every container must hold: the weight under its scheme."""
    return dequantize(quantize_rows(weight, 0, weight.shape[0]))


def reference_logits(graph: Graph, token_ids: Sequence[int]) -> F32:
    """f32[length, vocab] by the interpreter over the canonical weights."""
    logits: F32 = interpret(graph, np.array([token_ids], np.int64), canonical)[0]
    return logits


def random_ids(graph: Graph, length: int) -> list[int]:
    """Token ids without the special ones."""
    return [int(each) for each in np.random.default_rng(length).integers(3, graph.config.vocab_size, length)]


def divergences(expected: F32, found: F32) -> NDArray[np.float64]:
    """f64[length]: the Kullback-Leibler divergence of each position in nats."""
    p, q = _log_softmax(expected), _log_softmax(found)
    each: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=-1)
    return each


def _log_softmax(logits: F32) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normalized: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalized
