"""Rotary embedding: cos and sin caches in the artifact, and LongRoPE's choice between its two lists of factors.

Where the context reaches past LongRoPE's original one, both caches lie one below the other in one initializer: the
short factors' rows 0 ... original - 1, then the long factors' rows from position 0. Which of them applies depends on
the length of the whole sequence, attention_mask's width:

    start = original if total > original else 0
    cos   = Slice(cache, start, start + total)          GroupQueryAttention takes positions from 0

which copies as many rows as the sequence has tokens; an If between two caches copies the chosen one whole at every
token. Where GroupQueryAttention does not rotate, q and k are rotated before it, by position_ids, to which `start` is
added.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from converters.config import Rope
from converters.ops import Attention
from converters.quantize.tensor import F32
from converters.rope import cos_sin
from exporters.onnx.data_file import ONNX_TYPES, external_tensor
from exporters.onnx.lowering import MASK_LENGTH, MICROSOFT, Lowering, RotaryCaches
from exporters.onnx.names import POSITION_IDS
from exporters.onnx.settings import Settings


def cache_values(rope: Rope, settings: Settings) -> tuple[F32, F32]:
    """cos and sin, f32[rows, dim/2]: the context's rows, before them the original context's with the short factors."""
    if not settings.switches_rope:
        return cos_sin(rope, settings.context_length, long=False)
    short = cos_sin(rope, rope.original_context, long=False)
    long = cos_sin(rope, settings.context_length, long=True)
    return np.concatenate([short[0], long[0]]), np.concatenate([short[1], long[1]])


def lower_caches(lowering: Lowering, op: Attention) -> RotaryCaches | None:
    """The caches of a model, whose layers share one rotary embedding; None if it has none."""
    if op.rope is None:
        return None
    settings = lowering.settings
    names = "rope.cos", "rope.sin"
    for name, values in zip(names, cache_values(op.rope, settings), strict=True):
        stored = values.astype(settings.numpy_type)
        offset = lowering.data.store(stored)
        lowering.matrices.initializers[name] = external_tensor(
            name, ONNX_TYPES[settings.activations], stored.shape, offset, stored.nbytes
        )
    if not settings.switches_rope:
        return RotaryCaches(*names, POSITION_IDS)
    if settings.fused_attention:
        return _sliced(lowering, names, op.rope.original_context)
    return RotaryCaches(*names, _shifted_positions(lowering, op.rope.original_context))


def _sliced(lowering: Lowering, names: tuple[str, str], original: int) -> RotaryCaches:
    limit = lowering.constant("rope.original_context", original)
    is_long = lowering.emit("Greater", (MASK_LENGTH, limit), "rope.is_long")
    flag = lowering.emit("Cast", (is_long,), "rope.flag", to=TensorProto.INT64)
    axis = lowering.constant("zero", [0])
    start = lowering.emit("Mul", (flag, limit), "rope.start")
    stop = lowering.emit("Add", (start, MASK_LENGTH), "rope.stop")
    ends = [lowering.emit("Unsqueeze", (end, axis), f"{end}.row") for end in (start, stop)]
    cos, sin = (lowering.emit("Slice", (name, *ends, axis), f"{name}.chosen") for name in names)
    return RotaryCaches(cos, sin, "")


def _shifted_positions(lowering: Lowering, original: int) -> str:
    limit = lowering.constant("rope.original_context", original)
    last = lowering.emit("ReduceMax", (POSITION_IDS,), "rope.last_position", keepdims=0)
    is_long = lowering.emit("GreaterOrEqual", (last, limit), "rope.is_long")
    flag = lowering.emit("Cast", (is_long,), "rope.flag", to=TensorProto.INT64)
    start = lowering.emit("Mul", (flag, limit), "rope.start")
    return lowering.emit("Add", (POSITION_IDS, start), "rope.positions")


def rotate_query_and_key(lowering: Lowering, op: Attention, parts: tuple[str, ...], name: str) -> tuple[str, ...]:
    """(q, k, v) with q and k rotated by position."""
    assert lowering.rotary is not None and op.rope is not None
    assert len(parts) == 3, f"{name}: separate q, k and v expected"
    query, key, value = parts
    caches = lowering.rotary
    rotated = []
    for part, heads in ((query, op.num_heads), (key, op.num_kv_heads)):
        inputs = part, caches.positions, caches.cos, caches.sin
        # Without these two the operator takes the whole head to be rotated.
        partial = {} if op.rope.dim == op.head_dim else {"num_heads": heads, "rotary_embedding_dim": op.rope.dim}
        rotated.append(lowering.emit("RotaryEmbedding", inputs, f"{part}.rotated", MICROSOFT, **partial))
    return *rotated, value
