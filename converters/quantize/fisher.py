"""What quantizing costs, foreseen from gradients: the second-order estimate that needs no run for each matrix.

Near the float weights KL(float || changed) = 1/2 d F d, d the change of the weights and F the Fisher information: the
gradient at no change is zero (HAWQ-V2, Dong et al. 2020, arXiv:1911.03852). Rounding errors of different weights are
all but independent, so of F the diagonal is enough: F_ij = E[G_ij^2], G the gradient of -log p(token) by a weight for
tokens drawn from the model's own distribution (SqueezeLLM takes the diagonal likewise: Kim et al. 2023,
arXiv:2306.07629). As draws at different positions are independent, one draw at every position of a sequence makes an
unbiased G G of the sum of all their KLs.

Gradients are those of the ops in converters.ops, by hand. Memory holds the values of one sequence at the borders of
blocks, and those of one block: what is inside is computed again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from converters.arrays import products
from converters.graph import LOGITS, TOKEN_IDS, Graph, Node, Weight
from converters.interpret import WeightRows
from converters.ops import OPS, Add, Attention, Embedding, Linear, RmsNorm, Rows, SwiGlu
from converters.quantize.scheme import Scheme
from converters.quantize.sensitivity import QuantizedRows, require_finite
from converters.quantize.tensor import F32
from converters.rope import apply_rope, cos_sin

_ROWS = 1 << 22  # numbers of a gradient held at once

Gradients = Callable[[Node, Weight, np.ndarray, F32], None]
"""A node, one of its matrices, its inputs f32[sequences, length, in] (token ids for an Embedding), and the gradients
g f32[sequences, length, out] of the matrix's outputs; of a sequence, the matrix's own gradient is g.T @ x."""


def estimate_costs(
    graph: Graph,
    token_ids: NDArray[np.int64],
    schemes: Mapping[str, Sequence[Scheme]],
    importance: Mapping[str, F32],
    seed: int = 0,
    advance: Callable[[int], None] = lambda matrices: None,
) -> dict[str, NDArray[np.float64]]:
    """The mean KL, in nats, of storing each matrix in each of its schemes: f64[schemes] by weight name.

    token_ids: i64[sequences, length]; importance: f32[in] by weight name, for the quantizer. Matrices without schemes
    are passed over. `advance` is called with 1 for each use of a matrix. ModelError if the model computes no finite
    values.
    """
    costs = {name: np.zeros(len(each)) for name, each in schemes.items()}

    def see(node: Node, weight: Weight, x: np.ndarray, g: F32) -> None:
        stored = [
            QuantizedRows(replace(weight, scheme=scheme), importance.get(weight.name))
            for scheme in schemes.get(weight.name, ())
        ]
        if stored:
            find = _lookup_costs if isinstance(node.op, Embedding) else _linear_costs
            costs[weight.name] += find(stored, WeightRows(weight), x, g) / 2 / token_ids.size
        advance(1)

    see_gradients(graph, token_ids, seed, see)
    return costs


def use_count(graph: Graph) -> int:
    """How often estimate_costs calls `advance`."""
    return sum(len(node.op.weights) for node in graph.nodes if isinstance(node.op, Linear | Embedding))


def _linear_costs(stored: Sequence[Rows], exact: Rows, x: F32, g: F32) -> NDArray[np.float64]:
    """f64[schemes]: the sum over sequences, rows i and columns j of G_ij^2 E_ij^2."""
    rows, width = exact.shape
    totals = np.zeros(len(stored))
    step = max(1, _ROWS // width)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        values = exact[start:stop]
        fisher = np.zeros_like(values)
        for inputs, outputs in zip(x, g, strict=True):
            fisher += np.square(products().product(outputs[:, start:stop].T, inputs))
        totals += [np.vdot(fisher, np.square(each[start:stop] - values)) for each in stored]
    return totals


def _lookup_costs(stored: Sequence[Rows], exact: Rows, token_ids: NDArray[np.int64], g: F32) -> NDArray[np.float64]:
    """f64[schemes]: the sum over positions of g^2 times the squared error of the row that is looked up."""
    tokens, where = np.unique(token_ids, return_inverse=True)
    fisher = np.zeros((len(tokens), g.shape[-1]))
    np.add.at(fisher, where.reshape(-1), np.square(g.reshape(-1, g.shape[-1]), dtype=np.float64))
    totals = np.zeros(len(stored))
    for row, token in zip(fisher, tokens.tolist(), strict=True):
        values = exact[token : token + 1]
        totals += [np.vdot(row, np.square(each[token : token + 1] - values)[0]) for each in stored]
    return totals


def see_gradients(graph: Graph, token_ids: NDArray[np.int64], seed: int, see: Gradients) -> None:
    """Run token_ids i64[sequences, length] there and back; `see` gets each use of a matrix.

    The gradients are those of -log p(token), summed over the positions of a sequence, tokens drawn by the seed.
    ModelError if the model computes no finite values.
    """
    borders = _forward(graph, token_ids)
    gradients: dict[str, F32] = {}
    for segment, before in reversed(borders):
        values = dict(before)
        for node in segment:
            if node.name == LOGITS:
                gradients |= _head(graph, node, values[node.inputs[0]], seed, see)
            else:
                values[node.name] = _reference(graph, node, values)
        for node in reversed(segment):
            if node.name != LOGITS:
                _back(graph, node, values, gradients, see)


def _forward(graph: Graph, token_ids: NDArray[np.int64]) -> list[tuple[list[Node], dict[str, np.ndarray]]]:
    """Blocks of nodes, each with the values that it takes from before."""
    last_use = graph.last_uses()
    values: dict[str, np.ndarray] = {TOKEN_IDS: token_ids}
    borders = []
    index = 0
    for _, run in groupby(graph.nodes, lambda node: node.layer):
        segment = list(run)
        borders.append((segment, dict(values)))
        for node in segment:
            if node.name != LOGITS:
                values[node.name] = _reference(graph, node, values)
            for name in set(node.inputs):
                if last_use[name] == index:
                    del values[name]
            index += 1
    return borders


def _reference(graph: Graph, node: Node, values: Mapping[str, np.ndarray]) -> F32:
    weights = [WeightRows(graph.weights[name]) for name in node.op.weights]
    return OPS[type(node.op)].reference(node.op, [values[name] for name in node.inputs], weights)


def _head(graph: Graph, node: Node, x: F32, seed: int, see: Gradients) -> dict[str, F32]:
    """Draw a token at every position; the gradient of its -log p by the logits is p - onehot(token)."""
    g = _reference(graph, node, {node.inputs[0]: x})
    require_finite(g)
    g -= g.max(axis=-1, keepdims=True)
    np.exp(g, out=g)
    g /= g.sum(axis=-1, keepdims=True)
    flat = g.reshape(-1, g.shape[-1])
    for position, limit in enumerate(np.random.default_rng(seed).random(len(flat))):
        cumulated = np.cumsum(flat[position], dtype=np.float64)
        flat[position, np.searchsorted(cumulated, limit * cumulated[-1])] -= 1
    return {node.inputs[0]: _linear_back(graph, node, x, g, see)}


def _back(
    graph: Graph, node: Node, values: Mapping[str, np.ndarray], gradients: dict[str, F32], see: Gradients
) -> None:
    """Add what a node's inputs get from the gradient of its value, which nobody needs any more."""
    g = gradients.pop(node.name)
    inputs = [values[name] for name in node.inputs]
    match node.op:
        case Linear():
            parts = [_linear_back(graph, node, inputs[0], g, see)]
        case RmsNorm() as op:
            parts = [_rms_norm_back(op, inputs[0], WeightRows(graph.weights[op.weights[0]])[:], g)]
        case Attention() as op:
            parts = [attention_back(op, inputs[0], g)]
        case SwiGlu():
            parts = [_swiglu_back(inputs[0], g)]
        case Add():
            parts = [g, g]
        case Embedding():
            see(node, graph.weights[node.op.weights[0]], inputs[0], g)
            return
        case _:
            raise AssertionError(f"no gradient for {type(node.op).__name__}")
    for name, part in zip(node.inputs, parts, strict=True):
        gradients[name] = gradients[name] + part if name in gradients else part


def _linear_back(graph: Graph, node: Node, x: F32, g: F32, see: Gradients) -> F32:
    rows = x.reshape(-1, x.shape[-1])
    flat = g.reshape(-1, g.shape[-1])
    out = np.zeros_like(rows)
    first = 0
    step = max(1, _ROWS // x.shape[-1])
    for name in node.op.weights:
        weight = graph.weights[name]
        count = weight.shape[0]
        see(node, weight, x, g[..., first : first + count])
        values = WeightRows(weight)
        for start in range(0, count, step):
            stop = min(start + step, count)
            out += products().product(flat[:, first + start : first + stop], values[start:stop])
        first += count
    return out.reshape(x.shape)


def _rms_norm_back(op: RmsNorm, x: F32, weight: F32, g: F32) -> F32:
    """y = x / r * w, r = sqrt(mean x^2 + eps): dx = (g w) / r - x (x . g w) / (n r^3)."""
    r = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(op.epsilon))
    scaled = g * weight
    inner = np.sum(x * scaled, axis=-1, keepdims=True) / np.float32(x.shape[-1])
    back: F32 = scaled / r - x * inner / r**3
    return back


def _swiglu_back(x: F32, g: F32) -> F32:
    gate, up = np.split(x, 2, axis=-1)
    with np.errstate(over="ignore"):  # exp(-gate) is infinite below -88, and the sigmoid rightly 0
        sigmoid = 1 / (1 + np.exp(-gate))
    silu = gate * sigmoid
    back: F32 = np.concatenate([g * up * (sigmoid + silu * (1 - sigmoid)), g * silu], axis=-1)
    return back


def attention_back(op: Attention, x: F32, g: F32) -> F32:
    """The gradient by packed [q | k | v], f32[1, length, features], from that of the heads' output."""
    length = x.shape[1]
    heads, kv_heads, dim = op.num_heads, op.num_kv_heads, op.head_dim
    packed = x.reshape(-1, length, heads + 2 * kv_heads, dim).transpose(0, 2, 1, 3)
    angles = None if op.rope is None else cos_sin(op.rope, length)
    turned = packed[:, : heads + kv_heads]
    if angles is not None:
        turned = apply_rope(turned, *angles)
    apart = np.subtract.outer(np.arange(length), np.arange(length))
    hidden = (apart < 0) if op.window is None else (apart < 0) | (apart >= op.window)
    outward = g.reshape(-1, length, heads, dim).transpose(0, 2, 1, 3)
    back = np.zeros(packed.shape, np.float32)
    for b in range(len(x)):
        for head in range(heads):
            k, v = heads + head // (heads // kv_heads), heads + kv_heads + head // (heads // kv_heads)
            parts = _attend_back(turned[b, head], turned[b, k], packed[b, v], outward[b, head], hidden)
            for row, part in zip((head, k, v), parts, strict=True):
                back[b, row] += part
    if angles is not None:  # the transpose of a turn turns back; LongRoPE's factor on it stays one
        cos, sin = angles
        back[:, : heads + kv_heads] = apply_rope(back[:, : heads + kv_heads], cos, -sin)
    gradient: F32 = back.transpose(0, 2, 1, 3).reshape(x.shape)
    return gradient


def _attend_back(q: F32, k: F32, v: F32, g: F32, hidden: NDArray[np.bool_]) -> tuple[F32, F32, F32]:
    """Gradients by q, k and v, f32[length, dim] each, of softmax(q k^T / sqrt(dim) + mask) v for one head."""
    scale = np.float32(q.shape[1] ** -0.5)
    scores = np.where(hidden, np.float32(-np.inf), q @ k.T * scale)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    by_p = g @ v.T
    by_scores = p * (by_p - np.sum(p * by_p, axis=-1, keepdims=True)) * scale
    return by_scores @ k, by_scores.T @ q, p.T @ g
