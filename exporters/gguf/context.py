"""What llama.cpp does with a model's context: allocation, sliding windows."""

from __future__ import annotations

from exporters.base import Model, Semantics
from exporters.context import context_sentence

CONTEXT_MULTIPLE = 256  # llama-context.cpp rounds a context up to this


def semantics(model: Model) -> Semantics:
    """Up to which length llama.cpp computes what the model computes.

    Where its tokenizer is known to differ from the model's, the sentence says so too. The phi3 and llama architectures
    have no sliding window (llama.cpp pull request 13676).
    """
    window, context = model.graph.config.sliding_window, model.context_length
    exact_to = context
    parts = [context_sentence(model)]
    if window is not None and window < context:
        parts.append(
            f"llama.cpp ignores the model's sliding window of {window} tokens: longer sequences get full attention"
        )
        exact_to = window
    return Semantics("; ".join(parts) + ".", exact_to)


def allocated_context(length: int) -> int:
    """The context that llama.cpp allocates when asked for `length` tokens."""
    return -(-length // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
