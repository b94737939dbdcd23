"""The choices an ONNX artifact rests on, resolved from the recipe's options once."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from converters.errors import UsageError
from converters.quantize.scheme import NumberType, Scheme
from exporters.base import Activations, Model, TargetOptions
from exporters.options import ExecutionProvider, OnnxOptions

NUMPY_TYPES: dict[Activations, np.dtype] = {
    Activations.FP32: np.dtype(np.float32),
    Activations.FP16: np.dtype(np.float16),
    Activations.BF16: np.dtype(ml_dtypes.bfloat16),
}

# What each provider's GroupQueryAttention computes in, its customary type first. Read off the kernels' type
# constraints; the model builder of onnxruntime-genai allows the same pairs, but for fp16 on the CPU.
ACTIVATIONS: dict[ExecutionProvider, tuple[Activations, ...]] = {
    ExecutionProvider.CPU: (Activations.FP32, Activations.FP16),
    ExecutionProvider.CUDA: (Activations.FP16, Activations.BF16),
    ExecutionProvider.DML: (Activations.FP16,),
    ExecutionProvider.WEBGPU: (Activations.FP16, Activations.FP32),
}

# Providers that can read bfloat16 weights.
BFLOAT_PROVIDERS = (ExecutionProvider.CPU, ExecutionProvider.CUDA)

LARGEST_BLOCK = 128  # MatMulNBits takes powers of two from 16; every provider has kernels up to 128
SMALLEST_BLOCK = 16
MAX_CACHE = 1 << 26  # numbers of a rotary cache, 256 MiB: a million positions for heads of 128


@dataclass(frozen=True, slots=True)
class Settings:
    """What lowering decides by.

    `fused_attention`: GroupQueryAttention takes packed q, k, v and rotates q and k itself.
    """

    provider: ExecutionProvider
    activations: Activations
    accuracy_level: int | None
    context_length: int
    fused_attention: bool

    @property
    def numpy_type(self) -> np.dtype:
        return NUMPY_TYPES[self.activations]

    @property
    def logits(self) -> Activations:
        """The type of the logits: onnxruntime-genai reads fp32 and fp16."""
        return Activations.FP32 if self.activations is Activations.BF16 else self.activations

    def stores_zeros(self, scheme: Scheme) -> bool:
        """Whether zero_points is written. DirectML's MatMulNBits takes missing ones for 0, not for 2**(bits-1)."""
        return not scheme.symmetric or self.provider is ExecutionProvider.DML

    def block_size(self, scheme: Scheme, row: int) -> int:
        """Elements per scale for a row of `row` elements: the largest power of two up to 128 that divides the group.

        DirectML reads 4-bit zero points without padding between rows, so there the number of groups must be even.
        0 if no block size fits.
        """
        group = scheme.group_size_for(row)
        block = min(group & -group, LARGEST_BLOCK)
        if self.provider is ExecutionProvider.DML and scheme.bits == 4 and row // block % 2:
            block //= 2
        return block if block >= SMALLEST_BLOCK else 0


def resolve_settings(model: Model, options: TargetOptions) -> Settings:
    """Defaults filled in; UsageError for a float type that the provider cannot compute in."""
    assert isinstance(options, OnnxOptions)
    provider = options.execution_provider
    activations = options.activations or ACTIVATIONS[provider][0]
    if activations not in ACTIVATIONS[provider]:
        allowed = ", ".join(ACTIVATIONS[provider])
        raise UsageError(
            f"ONNX Runtime's {provider} provider does not compute attention in {activations}",
            where="target onnx, option activations",
            expected=allowed,
            found=activations,
            mend="Leave the option out for the provider's own type.",
        )
    rope = model.graph.config.rope
    # DirectML's kernel rotates nothing and wants three inputs; the others rotate pairs in multiples of 8.
    fused = provider is not ExecutionProvider.DML and rope.dim % 16 == 0
    return Settings(provider, activations, options.accuracy_level, model.context_length, fused)


def float_type(scheme: Scheme) -> Activations:
    """The float type a scheme stores."""
    if scheme.type is NumberType.BFLOAT:
        return Activations.BF16
    return Activations.FP32 if scheme.bits == 32 else Activations.FP16
