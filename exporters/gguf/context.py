"""What llama.cpp does with a model's context: allocation, LongRoPE, sliding windows."""

from __future__ import annotations

from converters.config import RopeKind
from exporters.base import Model, Semantics

CONTEXT_MULTIPLE = 256  # llama-context.cpp rounds a context up to this


def semantics(model: Model) -> Semantics:
    """At which lengths llama.cpp, opened with the file's own context, computes what the model computes.

    Where its tokenizer is known to differ from the model's, the sentence says so too.

    llama_model::get_rope_factors selects LongRoPE's factors by the allocated context, not by the length of the
    sequence. The phi3 and llama architectures have no sliding window (llama.cpp pull request 13676).
    """
    rope, window, context = model.graph.config.rope, model.graph.config.sliding_window, model.context_length
    exact_from, exact_to = 1, context
    parts = [f"context {context}"]
    if rope.kind is RopeKind.LONGROPE:
        parts.append(_longrope(context, rope.original_context))
        if allocated_context(context) > rope.original_context:
            exact_from = rope.original_context + 1
    if window is not None and window < context:
        parts.append(
            f"llama.cpp ignores the model's sliding window of {window} tokens: longer sequences get full attention"
        )
        exact_to = window
    return Semantics("; ".join(parts) + ".", exact_from, exact_to)


def allocated_context(length: int) -> int:
    """The context that llama.cpp allocates when asked for `length` tokens."""
    return -(-length // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE


def _longrope(context: int, original: int) -> str:
    if allocated_context(context) <= original:
        return (
            f"LongRoPE's short factors throughout; llama.cpp takes the long ones if it is told to allocate more than "
            f"{original} tokens"
        )
    return (
        f"llama.cpp takes LongRoPE's long factors at every length, since it selects by the context it allocates; "
        f"opened with at most {original} tokens it takes the short ones, as the model does for sequences that short"
    )
