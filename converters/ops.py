"""The op table: arity, shape rule and numpy reference of every operation, one row an op.

References compute in float32 on [batch, length, features] and are the meaning of the op: an exporter's lowering is
right when its runtime agrees with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from converters.arrays import products
from converters.config import Rope
from converters.errors import ModelError
from converters.quantize.tensor import F32
from converters.rope import apply_rope, cos_sin

Shape = tuple[int, ...]

MAX_SCORES = 1 << 23  # attention scores held at once: 32 MB
MAX_WEIGHTS = 1 << 22  # numbers of a matrix held at once: 16 MB


@dataclass(frozen=True, slots=True)
class Op:
    """An operation and its constants; `weights` are names in Graph.weights."""

    weights: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Embedding(Op):
    """Rows of the weight [vocab, hidden] selected by token ids."""


@dataclass(frozen=True, slots=True)
class RmsNorm(Op):
    """x / sqrt(mean(x^2) + epsilon) * weight  (Zhang & Sennrich 2019)."""

    epsilon: float = 1e-5


@dataclass(frozen=True, slots=True)
class Linear(Op):
    """x @ concat(weights, axis=0).T : several weights are stacked along the output axis."""


@dataclass(frozen=True, slots=True)
class Attention(Op):
    """Causal grouped-query attention over packed [q | k | v], with rotary embedding of q and k.

    q has num_heads * head_dim features, k and v num_kv_heads * head_dim each. Position t attends to positions
    max(0, t - window + 1) ... t. Scores are scaled by head_dim ** -0.5.
    """

    layer: int = 0
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 1
    window: int | None = None
    rope: Rope | None = None


@dataclass(frozen=True, slots=True)
class SwiGlu(Op):
    """silu(gate) * up over packed [gate | up]  (Shazeer 2020)."""


@dataclass(frozen=True, slots=True)
class Add(Op):
    """The residual sum."""


class Rows(Protocol):
    """A weight of which a reference takes rows as it needs them: an array, or one that still lies on disk."""

    @property
    def shape(self) -> Shape: ...

    def __getitem__(self, rows: slice, /) -> F32: ...


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One row of the table. `reference(op, inputs, weights)` returns the value as float32."""

    arity: int
    shape: Callable[[Op, Sequence[Shape], Sequence[Shape]], Shape]
    reference: Callable[[Op, Sequence[np.ndarray], Sequence[Rows]], F32]


def _require(op: Op, rule: str, fulfilled: bool, found: object) -> None:
    if not fulfilled:
        raise ModelError(f"shape rule of {type(op).__name__} broken", expected=rule, found=str(found))


def _embedding_shape(op: Op, inputs: Sequence[Shape], weights: Sequence[Shape]) -> Shape:
    _require(op, "a weight of rank 2", len(weights[0]) == 2, weights[0])
    return *inputs[0], weights[0][1]


def _embedding(op: Op, inputs: Sequence[np.ndarray], weights: Sequence[Rows]) -> F32:
    token_ids, where = np.unique(inputs[0], return_inverse=True)
    table = np.concatenate([weights[0][token : token + 1] for token in token_ids.tolist()])
    rows: F32 = table[where.reshape(inputs[0].shape)]
    return rows


def _rms_norm_shape(op: Op, inputs: Sequence[Shape], weights: Sequence[Shape]) -> Shape:
    _require(op, f"a weight [{inputs[0][-1]}]", weights[0] == inputs[0][-1:], weights[0])
    return inputs[0]


def _rms_norm(op: Op, inputs: Sequence[np.ndarray], weights: Sequence[Rows]) -> F32:
    assert isinstance(op, RmsNorm)
    x = inputs[0]
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
    normed: F32 = x / np.sqrt(mean_square + np.float32(op.epsilon)) * weights[0][:]
    return normed


def _linear_shape(op: Op, inputs: Sequence[Shape], weights: Sequence[Shape]) -> Shape:
    width = inputs[0][-1]
    _require(op, f"weights [out, {width}]", all(len(w) == 2 and w[1] == width for w in weights), list(weights))
    return *inputs[0][:-1], sum(w[0] for w in weights)


def _linear(op: Op, inputs: Sequence[np.ndarray], weights: Sequence[Rows]) -> F32:
    x = inputs[0].reshape(-1, inputs[0].shape[-1])
    out = np.empty((x.shape[0], sum(w.shape[0] for w in weights)), np.float32)
    step = max(1, MAX_WEIGHTS // x.shape[1])
    products().linear(x, (w[start : start + step] for w in weights for start in range(0, w.shape[0], step)), out)
    return out.reshape(*inputs[0].shape[:-1], out.shape[1])


def _attention_shape(op: Op, inputs: Sequence[Shape], weights: Sequence[Shape]) -> Shape:
    assert isinstance(op, Attention)
    width = (op.num_heads + 2 * op.num_kv_heads) * op.head_dim
    _require(op, f"{width} packed features", inputs[0][-1] == width, inputs[0])
    _require(op, "num_heads a multiple of num_kv_heads", op.num_heads % op.num_kv_heads == 0, op)
    return *inputs[0][:-1], op.num_heads * op.head_dim


def _attention(op: Op, inputs: Sequence[np.ndarray], weights: Sequence[Rows]) -> F32:
    assert isinstance(op, Attention)
    batch, length, _ = inputs[0].shape
    heads, kv_heads, dim = op.num_heads, op.num_kv_heads, op.head_dim
    shared = heads // kv_heads
    # [batch, length, heads * dim] -> [batch, heads, length, dim]
    packed = inputs[0].reshape(batch, length, heads + 2 * kv_heads, dim).transpose(0, 2, 1, 3)
    q, k, v = packed[:, :heads], packed[:, heads : heads + kv_heads], packed[:, heads + kv_heads :]
    if op.rope is not None:
        cos, sin = cos_sin(op.rope, length)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    v = np.ascontiguousarray(v)
    rows = max(1, min(length, MAX_SCORES // (shared * length)))
    out, attend = np.empty((batch, length, heads, dim), np.float32), products().attend
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        first = 0 if op.window is None else max(0, start - op.window + 1)
        mask = _mask(start, stop, first, op.window)
        for b in range(batch):
            for kv in range(kv_heads):  # the query heads that share k and v in one product
                group = slice(kv * shared, (kv + 1) * shared)
                mixed = attend(q[b, group, start:stop], k[b, kv, first:stop], v[b, kv, first:stop], mask)
                out[b, start:stop, group] = mixed.transpose(1, 0, 2)
    return out.reshape(batch, length, heads * dim)


def _mask(start: int, stop: int, first: int, window: int | None) -> F32:
    """f32[stop - start, stop - first]: 0 where query positions start... see key positions first..., -inf elsewhere."""
    query, key = np.arange(start, stop)[:, None], np.arange(first, stop)[None, :]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return np.where(seen, np.float32(0), np.float32(-np.inf))


def _swiglu_shape(op: Op, inputs: Sequence[Shape], weights: Sequence[Shape]) -> Shape:
    _require(op, "an even number of features", inputs[0][-1] % 2 == 0, inputs[0])
    return *inputs[0][:-1], inputs[0][-1] // 2


def _swiglu(op: Op, inputs: Sequence[np.ndarray], weights: Sequence[Rows]) -> F32:
    gate, up = np.split(inputs[0], 2, axis=-1)
    out: F32 = np.negative(gate)
    with np.errstate(over="ignore"):  # exp(-gate) is infinite below -88, and silu rightly 0
        np.exp(out, out=out)
    out += 1
    np.divide(gate, out, out=out)
    out *= up
    return out


def _add_shape(op: Op, inputs: Sequence[Shape], weights: Sequence[Shape]) -> Shape:
    _require(op, "equal shapes", inputs[0] == inputs[1], list(inputs))
    return inputs[0]


def _add(op: Op, inputs: Sequence[np.ndarray], weights: Sequence[Rows]) -> F32:
    out: F32 = inputs[0] + inputs[1]
    return out


OPS: dict[type[Op], OpSpec] = {
    Embedding: OpSpec(1, _embedding_shape, _embedding),
    RmsNorm: OpSpec(1, _rms_norm_shape, _rms_norm),
    Linear: OpSpec(1, _linear_shape, _linear),
    Attention: OpSpec(1, _attention_shape, _attention),
    SwiGlu: OpSpec(1, _swiglu_shape, _swiglu),
    Add: OpSpec(2, _add_shape, _add),
}
