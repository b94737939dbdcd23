"""The canonical quantized tensor that every exporter packs."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
FloatArray = NDArray[np.floating] | NDArray[ml_dtypes.bfloat16]


@dataclass(frozen=True, slots=True, eq=False)
class QuantTensor:
    """A block of rows of an integer-quantized matrix: `value = scale * (code - zero)`, exact in float32.

    codes: u8[out, in], 0 ... 2**bits - 1
    scale: f16[out, groups], may be negative; groups run along the input axis, in/groups elements each
    zero:  u8[out, groups], or None for 2**(bits-1)

    For asymmetric tensors the quantizer keeps `scale * zero` exact in fp16 (scales of 7 significant bits), and refuses
    weights for which that overflows, so that containers that store a minimum or a bias (Q4_1, MLX) hold the same
    numbers as those that store the zero.
    """

    codes: U8
    scale: F16
    zero: U8 | None
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        return int(self.codes.shape[1] // self.scale.shape[1])

    def zeros(self) -> U8:
        """u8[out, groups]: the zero points, also where they are implied."""
        if self.zero is not None:
            return self.zero
        return np.full(self.scale.shape, 1 << (self.bits - 1), np.uint8)

    def dequantize(self) -> F32:
        """f32[out, in], the exact values, never -0."""
        from converters.quantize.kernels import dequantize_codes  # numba: half a second that listings need not pay

        rows, groups = self.scale.shape
        codes = np.ascontiguousarray(self.codes).reshape(rows, groups, -1)
        return dequantize_codes(codes, self.scale.astype(np.float32), self.zeros()).reshape(self.codes.shape)

    def regroup(self, group_size: int) -> QuantTensor:
        """The same numbers with each scale repeated for smaller groups, for a container with a fixed group size."""
        if group_size == self.group_size:
            return self
        repeat, rest = divmod(self.group_size, group_size)
        assert rest == 0, f"groups of {self.group_size} cannot be split into groups of {group_size}"
        zero = None if self.zero is None else np.repeat(self.zero, repeat, axis=1)
        return QuantTensor(self.codes, np.repeat(self.scale, repeat, axis=1), zero, self.bits)


@dataclass(frozen=True, slots=True, eq=False)
class GgmlTensor:
    """A block of rows in one of llama.cpp's own block types, which no other container holds.

    type:   the scheme's name, "q4_k" for example
    blocks: u8[out, bytes of a row], blocks in row order, as a GGUF file stores them
    width:  values in a row
    """

    type: str
    blocks: U8
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shape[0], self.width


Tensor = QuantTensor | GgmlTensor | FloatArray
