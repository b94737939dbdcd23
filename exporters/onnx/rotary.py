"""Rotary embedding: cos and sin caches in the artifact, a row a position, which the layers of a model share."""

from __future__ import annotations

from converters.ops import Attention
from converters.rope import cos_sin
from exporters.onnx.data_file import ONNX_TYPES, external_tensor
from exporters.onnx.lowering import MICROSOFT, Lowering, RotaryCaches
from exporters.onnx.names import POSITION_IDS


def lower_caches(lowering: Lowering, op: Attention) -> RotaryCaches | None:
    """The caches of a model, whose layers share one rotary embedding; None if it has none."""
    if op.rope is None:
        return None
    settings = lowering.settings
    names = "rope.cos", "rope.sin"
    for name, values in zip(names, cos_sin(op.rope, settings.context_length), strict=True):
        stored = values.astype(settings.numpy_type)
        offset = lowering.data.store(stored)
        lowering.matrices.initializers[name] = external_tensor(
            name, ONNX_TYPES[settings.activations], stored.shape, offset, stored.nbytes
        )
    return RotaryCaches(*names)


def rotate_query_and_key(lowering: Lowering, op: Attention, parts: tuple[str, ...], name: str) -> tuple[str, ...]:
    """(q, k, v) with q and k rotated by position."""
    assert lowering.rotary is not None and op.rope is not None
    assert len(parts) == 3, f"{name}: separate q, k and v expected"
    query, key, value = parts
    caches = lowering.rotary
    rotated = []
    for part, heads in ((query, op.num_heads), (key, op.num_kv_heads)):
        inputs = part, POSITION_IDS, caches.cos, caches.sin
        # Without these two the operator takes the whole head to be rotated.
        partial = {} if op.rope.dim == op.head_dim else {"num_heads": heads, "rotary_embedding_dim": op.rope.dim}
        rotated.append(lowering.emit("RotaryEmbedding", inputs, f"{part}.rotated", MICROSOFT, **partial))
    return *rotated, value
