"""Every row of the op table against a naive computation, and its shape rule."""

from __future__ import annotations

import math

import numpy as np
import pytest

from converters import ops
from converters.config import Rope, RopeKind
from converters.errors import ModelError
from converters.ops import OPS, Add, Attention, Embedding, Linear, Op, RmsNorm, SwiGlu
from converters.quantize.tensor import F32

RNG = np.random.default_rng(0)


def normal(*shape: int) -> F32:
    return RNG.standard_normal(shape).astype(np.float32)


def run(op: Op, *inputs: np.ndarray, weights: tuple[F32, ...] = ()) -> F32:
    """The reference's value, which must have the shape that the rule says."""
    spec = OPS[type(op)]
    assert len(inputs) == spec.arity
    value = spec.reference(op, inputs, weights)
    assert value.shape == spec.shape(op, [each.shape for each in inputs], [each.shape for each in weights])
    assert value.dtype == np.float32
    return value


def test_embedding() -> None:
    table, ids = normal(7, 4), np.array([[3, 0], [6, 6]])
    assert np.array_equal(run(Embedding(("w",)), ids, weights=(table,))[1, 0], table[6])


def test_rms_norm() -> None:
    x, weight = normal(2, 3, 8), normal(8)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.1) * weight
    assert np.allclose(run(RmsNorm(("w",), 0.1), x, weights=(weight,)), expected, atol=1e-6)


def test_linear_stacks_its_weights() -> None:
    x, first, second = normal(2, 3, 8), normal(5, 8), normal(4, 8)
    value = run(Linear(("a", "b")), x, weights=(first, second))
    assert np.allclose(value[..., :5], x @ first.T, atol=1e-5)
    assert np.allclose(value[..., 5:], x @ second.T, atol=1e-5)


def test_swiglu_also_far_from_zero() -> None:
    gate = np.array([-200.0, -90.0, -1.0, 0.0, 1.0, 90.0, 200.0], np.float32)
    packed = np.concatenate([gate, np.full(7, 3, np.float32)])[None, None]
    with np.errstate(all="raise", under="ignore"):
        value = run(SwiGlu(), packed)[0, 0]
    expected = [3 * g / (1 + math.exp(-g)) for g in gate.tolist()]
    assert np.allclose(value, expected, rtol=1e-6, atol=1e-30)


def test_add() -> None:
    x, y = normal(1, 2, 3), normal(1, 2, 3)
    assert np.array_equal(run(Add(), x, y), x + y)


def naive_attention(op: Attention, x: F32) -> F32:
    """Position by position, in float64, without rope."""
    length, dim, shared = x.shape[1], op.head_dim, op.num_heads // op.num_kv_heads
    heads = x[0].astype(np.float64).reshape(length, -1, dim)
    out = np.zeros((length, op.num_heads, dim))
    for t in range(length):
        first = 0 if op.window is None else max(0, t - op.window + 1)
        for head in range(op.num_heads):
            k = heads[first : t + 1, op.num_heads + head // shared]
            v = heads[first : t + 1, op.num_heads + op.num_kv_heads + head // shared]
            score = np.exp(k @ heads[t, head] / math.sqrt(dim))
            out[t, head] = score / score.sum() @ v
    return out.reshape(1, length, -1).astype(np.float32)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("limit", [1, 100, 1 << 20])
def test_attention_in_blocks(window: int | None, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "MAX_SCORES", limit)
    op = Attention((), 0, num_heads=4, num_kv_heads=2, head_dim=6, window=window)
    x = normal(1, 11, 8 * 6)
    assert np.allclose(run(op, x), naive_attention(op, x), atol=1e-6)


def test_attention_depends_on_distance_alone() -> None:
    """Rotary embedding is relative: the same tokens further on attend in the same way."""
    op = Attention((), 0, 2, 1, 8, window=3, rope=Rope(RopeKind.DEFAULT, 100.0, 8))
    tokens = normal(1, 4, 4 * 8)
    value = run(op, np.concatenate([tokens, tokens, tokens], axis=1))
    assert np.allclose(value[:, 6:8], value[:, 10:12], atol=1e-5)


@pytest.mark.parametrize(
    ("op", "inputs", "weights"),
    [
        (Embedding(("w",)), [(1, 2)], [(8,)]),
        (RmsNorm(("w",)), [(1, 2, 8)], [(7,)]),
        (Linear(("w",)), [(1, 2, 8)], [(3, 7)]),
        (Linear(("a", "b")), [(1, 2, 8)], [(3, 8), (3, 9)]),
        (Attention((), 0, 4, 2, 6), [(1, 2, 47)], []),
        (Attention((), 0, 3, 2, 6), [(1, 2, 42)], []),
        (SwiGlu(), [(1, 2, 7)], []),
        (Add(), [(1, 2, 8), (1, 2, 9)], []),
    ],
)
def test_broken_shape_rule(op: Op, inputs: list[tuple[int, ...]], weights: list[tuple[int, ...]]) -> None:
    with pytest.raises(ModelError, match=f"shape rule of {type(op).__name__}"):
        OPS[type(op)].shape(op, inputs, weights)


def test_every_op_has_a_row() -> None:
    kinds = {each for each in vars(ops).values() if isinstance(each, type) and issubclass(each, Op)}
    assert set(OPS) == kinds - {Op}
