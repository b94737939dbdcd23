"""What every container says of its context."""

from __future__ import annotations

from converters.config import RopeKind
from exporters.base import Model


def context_sentence(model: Model) -> str:
    """The context's length and, for LongRoPE, which factors follow from it; without the full stop."""
    rope, limit = model.graph.config.rope, f"The context is {model.context_length} tokens"
    if rope.kind is not RopeKind.LONGROPE:
        return limit
    if rope.long:
        return (
            f"{limit}, more than LongRoPE's original {rope.original_context}: its long factors apply at every position,"
            " of short texts as well"
        )
    return f"{limit}, within LongRoPE's original {rope.original_context}: its short factors apply at every position"
