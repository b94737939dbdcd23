"""Grouped-query attention over a stateful key/value cache, with rotary embedding and a causal mask."""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset15 as ops

from converters.config import Rope
from converters.ops import Attention
from converters.rope import inverse_frequencies
from exporters.openvino.constants import ints, scalar

# Added to hidden scores: fp16's lowest number, so that a plugin computing in fp16 sees no infinity.
HIDDEN = -65504.0


class SequenceState:
    """What all layers share: the inputs, the caches written so far, and the mask and rotation built on first use."""

    def __init__(
        self,
        input_ids: ov.Output,
        attention_mask: ov.Output,
        position_ids: ov.Output,
        beam_idx: ov.Output,
    ) -> None:
        self.assigns: list[ov.Node] = []
        self._input_ids, self._attention_mask = input_ids, attention_mask
        self._position_ids, self._beam_idx = position_ids, beam_idx
        self._batch = _dimension(input_ids, 0)
        self._past_length: ov.Output | None = None
        self._masks: dict[int | None, ov.Output] = {}
        self._rotations: dict[Rope, tuple[ov.Output, ov.Output]] = {}

    def append(self, name: str, current: ov.Output, heads: int, head_dim: int) -> ov.Output:
        """[batch, heads, past + length, head_dim]: the cache `name` with the current keys or values at its end.

        Rows are first reordered by beam_idx. The name is what optimum-intel gives the variable.
        """
        empty = ops.broadcast(
            scalar(0.0), ops.concat([ops.unsqueeze(self._batch, scalar(0, np.int64)), ints(heads, 0, head_dim)], 0)
        )
        past = ops.read_value(empty, name, ov.Type.f32, ov.PartialShape([-1, heads, -1, head_dim]))
        past = ops.gather(past, self._beam_idx, scalar(0, np.int64))
        if self._past_length is None:
            self._past_length = _dimension(past.output(0), 2)
        total = ops.concat([past, current], -2)
        self.assigns.append(ops.assign(total, name))
        return total.output(0)

    def mask(self, window: int | None) -> ov.Output:
        """f32[batch, 1, length, past + length]: 0 where a position may be attended to, HIDDEN elsewhere."""
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> ov.Output:
        assert self._past_length is not None
        length = _dimension(self._input_ids, 1)
        total = ops.add(self._past_length, length)
        one = scalar(1, np.int64)
        keys = _unsqueeze(ops.range(scalar(0, np.int64), total, one, "i64"), 0, 1, 2)
        queries = _unsqueeze(ops.range(self._past_length, total, one, "i64"), 0, 1, 3)
        causal = ops.less_equal(keys, queries)
        present = _unsqueeze(ops.convert(self._attention_mask, "boolean"), 1, 2)
        if window is None:
            return _scores_mask(ops.bitwise_and(causal, present))
        # The chain of four ands, the Broadcast and the Slice are how SDPAToPagedAttention recognizes a window (its
        # matcher for gpt-oss): without it, paged attention drops the mask and silently attends to everything.
        near = ops.greater(keys, ops.add(queries, scalar(-window, np.int64)))
        true = scalar(True, np.bool_)
        visible = ops.bitwise_and(true, ops.bitwise_and(ops.bitwise_and(true, near), causal))
        visible = ops.bitwise_and(visible, present)
        shape = ops.concat([_unsqueeze(self._batch, 0), ints(1), _unsqueeze(length, 0), _unsqueeze(total, 0)], 0)
        mask = _scores_mask(ops.broadcast(visible, shape, broadcast_spec="BIDIRECTIONAL"))
        return ops.slice(mask, ints(0), _unsqueeze(total, 0), ints(1), ints(3)).output(0)

    def rotation(self, rope: Rope) -> tuple[ov.Output, ov.Output]:
        """cos and sin, f32[batch, 1, length, rope.dim] each, attention factor included."""
        if rope not in self._rotations:
            self._rotations[rope] = self._build_rotation(rope)
        return self._rotations[rope]

    def _build_rotation(self, rope: Rope) -> tuple[ov.Output, ov.Output]:
        frequencies = ops.constant(inverse_frequencies(rope).reshape(1, -1, 1))
        positions = ops.convert(_unsqueeze(self._position_ids, 1), "f32")  # [batch, 1, length]
        angles = ops.transpose(ops.matmul(frequencies, positions, False, False), ints(0, 2, 1))
        both_halves = ops.concat([angles, angles], -1)
        cos, sin = ops.cos(both_halves), ops.sin(both_halves)
        if rope.attention_factor != 1:
            cos, sin = (ops.multiply(each, scalar(rope.attention_factor)) for each in (cos, sin))
        return _unsqueeze(cos, 1), _unsqueeze(sin, 1)


def attend(op: Attention, packed: ov.Output, sequence: SequenceState) -> ov.Output:
    """packed [batch, length, (heads + 2 kv_heads) * head_dim] -> [batch, length, heads * head_dim]."""
    heads, kv_heads, dim = op.num_heads, op.num_kv_heads, op.head_dim
    widths = ints(heads * dim, kv_heads * dim, kv_heads * dim)
    q, k, v = ops.variadic_split(packed, scalar(-1, np.int64), widths).outputs()
    q, k, v = _split_heads(q, heads, dim), _split_heads(k, kv_heads, dim), _split_heads(v, kv_heads, dim)
    if op.rope is not None:
        cos, sin = sequence.rotation(op.rope)
        q, k = _rotate(q, cos, sin, op.rope.dim, dim), _rotate(k, cos, sin, op.rope.dim, dim)
    k = sequence.append(_variable(op.layer, "key"), k, kv_heads, dim)
    v = sequence.append(_variable(op.layer, "value"), v, kv_heads, dim)
    if kv_heads != heads:
        k, v = _repeat(k, kv_heads, heads, dim), _repeat(v, kv_heads, heads, dim)
    scale = scalar(dim**-0.5)
    attended = ops.scaled_dot_product_attention(q, k, v, sequence.mask(op.window), scale, causal=False)
    return ops.reshape(ops.transpose(attended, ints(0, 2, 1, 3)), ints(0, 0, heads * dim), special_zero=True).output(0)


def _variable(layer: int, part: str) -> str:
    return f"past_key_values.{layer}.{part}present.{layer}.{part}"


def _split_heads(x: ov.Output, heads: int, dim: int) -> ov.Output:
    """[batch, length, heads * dim] -> [batch, heads, length, dim]."""
    return ops.transpose(ops.reshape(x, ints(0, 0, heads, dim), special_zero=True), ints(0, 2, 1, 3)).output(0)


def _rotate(x: ov.Output, cos: ov.Output, sin: ov.Output, rotary_dim: int, dim: int) -> ov.Output:
    """Half-split rotation of the first rotary_dim features of x [batch, heads, length, dim]."""
    axis = scalar(3, np.int64)
    rest: list[ov.Output] = []
    if rotary_dim < dim:
        x, kept = ops.variadic_split(x, axis, ints(rotary_dim, dim - rotary_dim)).outputs()
        rest = [kept]
    first, second = ops.variadic_split(x, axis, ints(rotary_dim // 2, rotary_dim // 2)).outputs()
    turned = ops.concat([ops.multiply(second, scalar(-1.0)), first], -1)
    rotated = ops.add(ops.multiply(x, cos), ops.multiply(turned, sin)).output(0)
    return ops.concat([rotated, *rest], -1).output(0) if rest else rotated


def _repeat(x: ov.Output, kv_heads: int, heads: int, dim: int) -> ov.Output:
    """Each of the kv_heads repeated for its group of query heads: [batch, heads, total, dim]."""
    lengths = ops.shape_of(x, "i64")
    batch_and_heads = ops.gather(lengths, ints(0, 1), scalar(0, np.int64))
    total = ops.gather(lengths, ints(2), scalar(0, np.int64))
    shape = ops.concat([batch_and_heads, ints(heads // kv_heads), total, ints(dim)], 0)
    repeated = ops.broadcast(ops.unsqueeze(x, scalar(2, np.int64)), shape, broadcast_spec="BIDIRECTIONAL")
    return ops.reshape(repeated, ints(0, heads, -1, dim), special_zero=True).output(0)


def _scores_mask(visible: ov.Node) -> ov.Output:
    return ops.select(visible, scalar(0.0), scalar(HIDDEN)).output(0)


def _dimension(x: ov.Output, axis: int) -> ov.Output:
    """i64 scalar."""
    return ops.gather(ops.shape_of(x, "i64"), scalar(axis, np.int64), scalar(0, np.int64)).output(0)


def _unsqueeze(x: ov.Node | ov.Output, *axes: int) -> ov.Output:
    return ops.unsqueeze(x, ints(*axes)).output(0)
