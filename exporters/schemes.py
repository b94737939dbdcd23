"""What containers say to families they do not know, and those without llama.cpp's block types to these."""

from __future__ import annotations

from collections.abc import Collection

from converters.errors import UsageError
from converters.quantize.scheme import NumberType
from exporters.base import Model, Target


def require_family(model: Model, target: Target, families: Collection[str]) -> None:
    """UsageError if a container's runtime has no name for the model's family."""
    family = model.graph.config.family
    if family not in families:
        raise UsageError(
            "the container's runtime has no model of this family",
            where=f"target {target}",
            expected=", ".join(families),
            found=family,
            mend=f"Leave {target} out of the recipe's targets.",
        )


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
