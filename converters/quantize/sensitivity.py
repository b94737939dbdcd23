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

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from converters.errors import NotFiniteError, ResourceError
from converters.graph import LOGITS, TOKEN_IDS, Graph, Node, Weight
from converters.interpret import WeightRows
from converters.ops import OPS, Rows
from converters.quantize.block import dequantize, quantize_rows
from converters.quantize.kernels import widen
from converters.quantize.scheme import Scheme
from converters.quantize.stream import Store, Stream, join
from converters.quantize.tensor import F32

_TOGETHER = 1 << 12  # tokens of all streams that walk through a block at once
_FAR = 4.0  # a change of a logit, up to which float32 holds the sum of p e^d to many digits
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
    store: Store | None = None,
) -> dict[tuple[str, ...], float]:
    """The mean KL, in nats, that each of `stacks` costs when it alone is quantized to its weights' schemes.

    token_ids: i64[sequences, length]; importance: f32[in] by weight name, for the quantizer. `advance` is called with 1
    for each of `segment_count`. Values lie in `store`, one of its own if there is none. ModelError if the model
    computes no finite logits, ResourceError if the store's disk is full.
    """
    store = store or Store()
    try:
        return _measured(graph, token_ids, importance, advance, store)
    except OSError as error:
        raise ResourceError(
            f"cannot keep what the model computes: {error.strerror or error}",
            where=str(store.folder or tempfile.gettempdir()),
            mend="Free space there, or set TMPDIR to a folder on another disk.",
        ) from error


def _measured(
    graph: Graph,
    token_ids: NDArray[np.int64],
    importance: Mapping[str, F32],
    advance: Callable[[int], None],
    store: Store,
) -> dict[tuple[str, ...], float]:
    float_branch = _Branch(Stream(store, {TOKEN_IDS: store.put(token_ids)}), {})
    branches: dict[tuple[str, ...], _Branch] = {}
    starts = {names[0]: names for names in stacks(graph)}
    group = max(1, _TOGETHER // token_ids.size)
    head = len(graph.nodes) - 1
    for segment in _segments(graph):
        if segment[0] == head:
            break
        begun = [starts.pop(name) for i in segment for name in graph.nodes[i].op.weights if name in starts]
        waiting = list(branches.values())
        for names in begun:
            branches[names] = _branched(graph, float_branch, names, importance)
        for i in range(0, len(waiting), group):
            _advance_together(graph, segment, waiting[i : i + group])
        for names in begun:
            _advance(graph, segment, branches[names])
        _advance(graph, segment, float_branch)
        advance(1)
    for names in starts.values():  # the head, where it is not the embedding
        branches[names] = _branched(graph, float_branch, names, importance)
    found = _divergences(graph, float_branch, branches)
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


@dataclass(frozen=True, slots=True)
class _Branch:
    """A model's values that are still needed, and the weights it has changed."""

    stream: Stream
    changed: Mapping[str, Rows]


def _branched(graph: Graph, floats: _Branch, names: Sequence[str], importance: Mapping[str, F32]) -> _Branch:
    """A model that is the float one so far, and from here on has these weights changed."""
    changed = {name: QuantizedRows(graph.weights[name], importance.get(name)) for name in names}
    return _Branch(floats.stream.copy(), changed)


def _segments(graph: Graph) -> list[list[int]]:
    """Indices of the nodes of each block; what comes before and after has segments of its own, the head last."""
    return [
        list(run)
        for _, run in groupby(range(len(graph.nodes)), lambda i: (graph.nodes[i].layer, i == len(graph.nodes) - 1))
    ]


def _advance(graph: Graph, segment: Sequence[int], branch: _Branch) -> None:
    last_use = graph.last_uses()
    for i in segment:
        node = graph.nodes[i]
        branch.stream.run(node, _weights(graph, node, branch.changed))
        branch.stream.forget({name for name in node.inputs if last_use[name] == i})


def _advance_together(graph: Graph, segment: Sequence[int], branches: Sequence[_Branch]) -> None:
    """Branches whose changes lie behind them: one walk over all their sequences. A tied embedding's lies ahead too, but
    in the head's segment."""
    joined = _Branch(join([branch.stream for branch in branches]), {})
    _advance(graph, segment, joined)
    joined.stream.part([branch.stream for branch in branches])


def _weights(graph: Graph, node: Node, changed: Mapping[str, Rows]) -> list[Rows]:
    return [changed.get(name) or WeightRows(graph.weights[name]) for name in node.op.weights]


def _divergences(
    graph: Graph, floats: _Branch, branches: Mapping[tuple[str, ...], _Branch]
) -> dict[tuple[str, ...], float]:
    head = graph.nodes[-1]

    def logits(branch: _Branch) -> F32:
        inputs = [branch.stream.values[name] for name in head.inputs]
        weights = _weights(graph, head, branch.changed)
        return OPS[type(head.op)].reference(head.op, [each.read(0, len(each)) for each in inputs], weights)

    reference = logits(floats)
    require_finite(reference)
    p = np.exp(reference - reference.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    found = {}
    for names, branch in branches.items():
        difference = logits(branch)
        difference -= reference
        require_finite(difference, f"{LOGITS} with {' and '.join(names)} quantized")
        found[names] = mean_kl(p, reference, difference)
    return found


def require_finite(logits: F32, where: str = LOGITS) -> None:
    """ModelError if a model's logits on calibration tokens are not."""
    if not np.isfinite(logits).all():
        raise NotFiniteError(
            "the model computes no finite values on calibration tokens",
            where=where,
            found="NaN or Inf",
            mend="The checkpoint is damaged: download it again or use another.",
        )


def mean_kl(p: F32, logits: F32, difference: F32) -> float:
    """Mean over positions of KL(p || q) in nats, p = softmax(logits), q = softmax(logits + difference).

    p, logits, difference: f32[..., vocab]. KL = log sum p e^d - sum p d, exact for the smallest d, where the difference
    of two log-softmaxes would drown it. Where a d is large, that difference is taken: p may be 0 in float32 where p e^d
    is not.
    """
    far = np.maximum(difference.max(axis=-1), -difference.min(axis=-1)) > _FAR
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # only where it is far
        expected = np.sum(p * difference, axis=-1, dtype=np.float64)
        grown = np.sum(p * np.expm1(difference), axis=-1, dtype=np.float64)
        divergence = np.log1p(grown) - expected
    for position in map(tuple, np.argwhere(far)):
        before = logits[position].astype(np.float64)
        log_p, log_q = _log_softmax(before), _log_softmax(before + difference[position])
        divergence[position] = np.exp(log_p) @ (log_p - log_q)
    return float(np.mean(divergence))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    below = logits - logits.max()
    found: NDArray[np.float64] = below - np.log(np.exp(below).sum())
    return found
