"""What a container without llama.cpp's block types says to them."""

from __future__ import annotations

from converters.errors import UsageError
from converters.quantize.scheme import NumberType
from exporters.base import Model, Target


def refuse_ggml_schemes(model: Model, target: Target) -> None:
    """UsageError that names the first weight under a GGML scheme and what to do."""
    for weight in model.graph.weights.values():
        if weight.scheme.type is NumberType.GGML:
            mix = f" (of the mix {model.mix})" if model.mix else ""
            raise UsageError(
                "only GGUF holds llama.cpp's block types",
                where=f"target {target}, role {weight.role.value}, weight {weight.name}",
                expected="an int or a float scheme",
                found=weight.scheme.name + mix,
                mend=f"Leave {target} out of the recipe's targets, or choose an int scheme such as int4_g32.",
            )
