"""How much the model's answers change when one matrix is stored in fewer bits.

One stack of matrices is quantized, all others keep the checkpoint's numbers, and KL(float || changed) of the next-token
distributions is taken over calibration tokens. Streams, one for each stack, walk the graph together, block by block:
each branches off the float model's values at the block of its stack, and the weights of a block are read once for many.

A KL grows with the square of a small error (its gradient at zero error is zero: HAWQ-V2, Dong et al. 2020,
arXiv:1911.03852). So what a stack costs in another scheme is what was measured, times the ratio of the two schemes'
squared errors, weighted by how hard each input column is driven (`scheme_error`). For the same reason the costs of
stacks add up, as far as their errors are small and independent (ZeroQ, Cai et al. 2020, arXiv:2001.00281).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from converters.errors import ModelError
from converters.graph import LOGITS, TOKEN_IDS, Graph, Node, Weight
from converters.interpret import WeightRows
from converters.ops import OPS, Rows
from converters.quantize.block import dequantize, quantize_rows
from converters.quantize.kernels import widen
from converters.quantize.scheme import Scheme
from converters.quantize.tensor import F32

_TOGETHER = 1 << 12  # tokens of all streams that walk through a block at once
_STRIPS, _STRIP_ROWS = 16, 32  # of a matrix whose error is measured: as much as tells schemes apart


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """A weight as its scheme stores it, quantized as its rows are asked for."""

    weight: Weight
    importance: F32 | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def __getitem__(self, rows: slice) -> F32:
        start, stop, _ = rows.indices(self.weight.shape[0])
        return dequantize(quantize_rows(self.weight, start, stop, self.importance))


def stacks(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """The matrices that share a scheme: those that one node stacks. Every container can hold these as one matrix, and
    some can only so. A tied embedding is one, by itself."""
    found = dict.fromkeys(node.op.weights for node in graph.nodes if node.op.weights)
    return tuple(names for names in found if len(graph.weights[names[0]].shape) == 2)


def measure_sensitivity(
    graph: Graph,
    token_ids: NDArray[np.int64],
    importance: Mapping[str, F32],
    advance: Callable[[int], None] = lambda segments: None,
) -> dict[tuple[str, ...], float]:
    """The mean KL, in nats, that each of `stacks` costs when it alone is quantized to its weights' schemes.

    token_ids: i64[sequences, length]; importance: f32[in] by weight name, for the quantizer. `advance` is called with 1
    for each of `segment_count`. ModelError if the model computes no finite logits.
    """
    float_stream = _Stream({TOKEN_IDS: token_ids})
    streams: dict[tuple[str, ...], _Stream] = {}
    starts = {names[0]: names for names in stacks(graph)}
    group = max(1, _TOGETHER // token_ids.size)
    head = len(graph.nodes) - 1
    for segment in _segments(graph):
        if segment[0] == head:
            break
        begun = [starts.pop(name) for i in segment for name in graph.nodes[i].op.weights if name in starts]
        for names in begun:
            changed = {name: QuantizedRows(graph.weights[name], importance.get(name)) for name in names}
            streams[names] = _Stream(dict(float_stream.values), changed)
        waiting = [stream for names, stream in streams.items() if names not in begun]
        for i in range(0, len(waiting), group):
            _advance_together(graph, segment, waiting[i : i + group])
        for names in begun:
            _advance(graph, segment, streams[names])
        _advance(graph, segment, float_stream)
        advance(1)
    for names in starts.values():  # the head, where it is not the embedding
        changed = {name: QuantizedRows(graph.weights[name], importance.get(name)) for name in names}
        streams[names] = _Stream(dict(float_stream.values), changed)
    found = _divergences(graph, float_stream, streams)
    advance(1)
    return found


def segment_count(graph: Graph) -> int:
    """How often measure_sensitivity calls `advance`."""
    return len(_segments(graph))


def scheme_error(weight: Weight, scheme: Scheme, importance: F32 | None) -> float:
    """Mean over rows of sum_j importance_j E_j^2, E the error of storing a row in the scheme; of some rows only."""
    rows, total, count = weight.shape[0], 0.0, 0
    every = max(_STRIP_ROWS, rows // _STRIPS)
    stored = replace(weight, scheme=scheme)
    for start in range(0, rows, every):
        stop = min(start + _STRIP_ROWS, rows)
        error = widen(weight.source.read(start, stop))[0] - dequantize(quantize_rows(stored, start, stop, importance))
        squares = np.square(error, dtype=np.float64)
        total += float((squares if importance is None else squares * importance).sum())
        count += stop - start
    return total / count


@dataclass(slots=True)
class _Stream:
    """A model's values that are still needed, [sequences, length, features] by name, and the weights it has changed."""

    values: dict[str, np.ndarray]
    changed: Mapping[str, Rows] = field(default_factory=dict)


def _segments(graph: Graph) -> list[list[int]]:
    """Indices of the nodes of each block; what comes before and after has segments of its own, the head last."""
    return [
        list(run)
        for _, run in groupby(range(len(graph.nodes)), lambda i: (graph.nodes[i].layer, i == len(graph.nodes) - 1))
    ]


def _advance(graph: Graph, segment: Sequence[int], stream: _Stream) -> None:
    last_use = graph.last_uses()
    for i in segment:
        node = graph.nodes[i]
        stream.values[node.name] = _value(graph, node, stream.values, stream.changed)
        for name in set(node.inputs):
            if last_use[name] == i:
                del stream.values[name]


def _advance_together(graph: Graph, segment: Sequence[int], streams: Sequence[_Stream]) -> None:
    """Streams whose changes lie behind them: one walk over all their sequences. A tied embedding's lies ahead too, but
    in the head's segment."""
    joined = _Stream({name: np.concatenate([each.values[name] for each in streams]) for name in streams[0].values})
    _advance(graph, segment, joined)
    for k, stream in enumerate(streams):
        stream.values = {name: np.split(value, len(streams))[k] for name, value in joined.values.items()}


def _value(graph: Graph, node: Node, values: Mapping[str, np.ndarray], changed: Mapping[str, Rows]) -> F32:
    weights = [changed.get(name) or WeightRows(graph.weights[name]) for name in node.op.weights]
    return OPS[type(node.op)].reference(node.op, [values[name] for name in node.inputs], weights)


def _divergences(
    graph: Graph, float_stream: _Stream, streams: Mapping[tuple[str, ...], _Stream]
) -> dict[tuple[str, ...], float]:
    head = graph.nodes[-1]
    reference = _value(graph, head, float_stream.values, {})
    require_finite(reference)
    p = np.exp(reference - reference.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return {
        names: mean_kl(p, _value(graph, head, stream.values, stream.changed) - reference)
        for names, stream in streams.items()
    }


def require_finite(logits: F32) -> None:
    """ModelError if a model's logits on calibration tokens are not."""
    if not np.isfinite(logits).all():
        raise ModelError(
            "the model computes no finite values on calibration tokens",
            where=LOGITS,
            found="NaN or Inf",
            mend="The checkpoint is damaged: download it again or use another.",
        )


def mean_kl(p: F32, difference: F32) -> float:
    """Mean over positions of KL(p || q) in nats, q = softmax(log p + difference); f32[..., vocab] both.

    = log sum p e^d - sum p d, exact for the smallest d, where the difference of two log-softmaxes would drown it.
    """
    expected = np.sum(p * difference, axis=-1, dtype=np.float64)
    grown = np.sum(p * np.expm1(difference), axis=-1, dtype=np.float64)
    return float(np.mean(np.log1p(grown) - expected))
