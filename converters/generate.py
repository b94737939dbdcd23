"""Text that a model writes itself, many sequences at once: what it can be calibrated with when no data are at hand.

The idea is LLM-QAT's (Liu et al. 2023, arXiv:2305.17888): a model's own samples are distributed like what it was
trained on. There a sequence begins with a random token and goes on greedily for some steps; beginnings that the model
itself draws, after BOS or after a chat template's opening of the user's turn (Magpie, Xu et al. 2024,
arXiv:2406.08464), need no greedy steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from converters.errors import NotFiniteError
from converters.graph import Graph, Node, Weight
from converters.interpret import WeightRows, by_reference, interpret
from converters.ops import Attention, Embedding, Rows
from converters.quantize.tensor import F32
from converters.rope import apply_rope, cos_sin

KEYS = 256  # for which scores are computed at a time: more make OpenBLAS copy them, at three times the cost
MOST_NBYTES = 2 << 30  # of widened weights, keys and values


class Decoder:
    """A batch of sequences that grow by a token a step, up to `length`; keys and values of the past stay in memory.

    The logits are those of `interpret` for the whole sequences.
    """

    def __init__(self, graph: Graph, batch: int, length: int, read: Callable[[Weight], Rows] = WeightRows) -> None:
        self._graph, self._read, self._length = graph, read, length
        self._position = 0
        # By name f32[2, batch, kv_heads, length, head_dim]: rotated keys, values.
        self._past = {
            node.name: np.zeros((2, batch, op.num_kv_heads, length, op.head_dim), np.float32)
            for node, op in attentions(graph)
        }
        self._rotations = {node.name: cos_sin(op.rope, length) for node, op in attentions(graph) if op.rope is not None}

    def step(self, token_ids: NDArray[np.int64]) -> F32:
        """Logits f32[batch, vocab] after one more token of each sequence, token_ids i64[batch]."""
        assert self._position < self._length, "no room for another token"
        logits = interpret(self._graph, token_ids[:, None], self._read, evaluate=self._evaluate)
        self._position += 1
        return logits[:, 0]

    def _evaluate(self, node: Node, inputs: Sequence[np.ndarray], weights: Sequence[Rows]) -> F32:
        if not isinstance(node.op, Attention):
            return by_reference(node, inputs, weights)
        op, position = node.op, self._position
        batch, kv_heads, dim = len(inputs[0]), op.num_kv_heads, op.head_dim
        # [batch, 1, features] -> [batch, heads, head_dim]
        packed = inputs[0].reshape(batch, op.num_heads + 2 * kv_heads, dim)
        turned, v = packed[:, :-kv_heads], packed[:, -kv_heads:]
        if op.rope is not None:
            cos, sin = self._rotations[node.name]
            turned = apply_rope(turned, cos[position], sin[position])
        keys, values = self._past[node.name]
        keys[:, :, position], values[:, :, position] = turned[:, op.num_heads :], v
        first, stop = 0 if op.window is None else max(0, position + 1 - op.window), position + 1
        q = turned[:, : op.num_heads].reshape(batch, kv_heads, op.num_heads // kv_heads, dim) * np.float32(dim**-0.5)
        scores = np.empty((*q.shape[:3], stop - first), np.float32)
        for start in range(first, stop, KEYS):
            part = slice(start, min(start + KEYS, stop))
            scores[..., start - first : part.stop - first] = q @ keys[:, :, part].swapaxes(2, 3)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        mixed: F32 = scores @ values[:, :, first:stop] / scores.sum(axis=-1, keepdims=True)
        return mixed.reshape(batch, 1, op.num_heads * dim)


def attentions(graph: Graph) -> list[tuple[Node, Attention]]:
    """The nodes that look at other positions."""
    return [(node, node.op) for node in graph.nodes if isinstance(node.op, Attention)]


def generate(
    graph: Graph,
    sequences: int,
    length: int,
    seed: int,
    openings: Sequence[Sequence[int]] = ((),),
    stops: Collection[int] = (),
    most_nbytes: int = MOST_NBYTES,
    advance: Callable[[int], None] = lambda tokens: None,
) -> NDArray[np.int64]:
    """Token ids i64[sequences, length], each drawn from the softmax over its predecessors' logits, temperature 1.

    A sequence begins with openings[0], which is given, or with a random token if that is empty. Where the model draws
    one of `stops` the next opening follows, after the last one the first again; one that begins with a stop itself
    takes the place of the one drawn. `advance` is told how many tokens have been added. ModelError if logits are not
    finite.

    Widened weights, keys and values take about `most_nbytes`: weights that do not fit into half of that are read anew
    in every step, and as many sequences are written at a time as there is room for. The numbers that decide are drawn
    ahead, so the text does not depend on that; it does on the last bits of sums, which differ between builds of BLAS.
    """
    chances = np.random.default_rng(seed).random((sequences, length))
    read, batch = _reader(graph, most_nbytes // 2), batch_size(graph, sequences, length, most_nbytes)
    ids = np.empty((sequences, length), np.int64)
    for start in range(0, sequences, batch):
        part = slice(start, start + batch)
        decoder, turns = Decoder(graph, len(ids[part]), length, read), [_Turns(openings, stops) for _ in ids[part]]
        logits = np.zeros((len(turns), graph.config.vocab_size), np.float32)  # all alike: a random token
        logits[:, list(stops)] = -np.inf
        for position in range(length):
            if position:
                logits = decoder.step(ids[part, position - 1])
            drawn = draw(logits, chances[part, position])
            ids[part, position] = [turn.choose(token) for turn, token in zip(turns, drawn.tolist(), strict=True)]
            advance(len(turns))
    return ids


class _Turns:
    """What one sequence is given, and when."""

    def __init__(self, openings: Sequence[Sequence[int]], stops: Collection[int]) -> None:
        self._openings, self._stops = cycle(openings), frozenset(stops)
        self._given = deque(next(self._openings))

    def choose(self, drawn: int) -> int:
        """The sequence's next token: the one drawn, unless another is given."""
        if not self._given:
            if drawn not in self._stops:
                return drawn
            opening = next(self._openings)
            self._given.extend(opening if opening and opening[0] in self._stops else (drawn, *opening))
        return self._given.popleft()


def draw(logits: F32, chances: NDArray[np.float64]) -> NDArray[np.int64]:
    """i64[batch]: tokens at these quantiles, in [0, 1), of softmax(logits), f32[batch, vocab]. ModelError for NaN."""
    most = logits.max(axis=1, keepdims=True)
    if not np.isfinite(most).all():
        raise NotFiniteError(
            "the model computes no finite logits",
            where="generating calibration text",
            mend="Download the model again; if it is the publisher's, calibrate with text.",
        )
    below = np.cumsum(np.exp(logits - most), axis=1, dtype=np.float64)
    found = [np.searchsorted(row, chance * row[-1], side="right") for row, chance in zip(below, chances, strict=True)]
    return np.minimum(np.array(found, np.int64), np.int64(logits.shape[1] - 1))


def batch_size(graph: Graph, sequences: int, length: int, most_nbytes: int = MOST_NBYTES) -> int:
    """Sequences that `generate` writes at a time: as evenly as the room for keys and values allows."""
    room = most_nbytes - min(most_nbytes // 2, sum(_wide_nbytes(graph.weights[name]) for name in _used(graph)))
    past = sum(2 * 4 * op.num_kv_heads * op.head_dim for _, op in attentions(graph)) * length
    rounds = math.ceil(sequences / max(1, room // past))
    return math.ceil(sequences / rounds)


def _reader(graph: Graph, most_nbytes: int) -> Callable[[Weight], Rows]:
    """Reads weights from memory, as far as they fit."""
    held: dict[str, F32] = {}
    for name in _used(graph):
        weight = graph.weights[name]
        if _wide_nbytes(weight) <= most_nbytes:
            most_nbytes -= _wide_nbytes(weight)
            held[name] = WeightRows(weight)[:]
    return lambda weight: held.get(weight.name, WeightRows(weight))


def _used(graph: Graph) -> dict[str, None]:
    """Weights that every step needs whole."""
    return dict.fromkeys(name for node in graph.nodes if not isinstance(node.op, Embedding) for name in node.op.weights)


def _wide_nbytes(weight: Weight) -> int:
    return 4 * math.prod(weight.shape)
