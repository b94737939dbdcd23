"""llama.cpp's block types: how many values and bytes a block has, how rows get into blocks and back.

Block layouts are those of ggml-common.h. Quantizers take rows f32[n, in] and the importance f32[in] of their columns
(or None: ggml's own weights for that case) and return u8[n, bytes of a row]; dequantizers return the exact float32
values that ggml's dequantize_row_* compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from converters.quantize.tensor import F32, U8


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One block type, named as its scheme."""

    name: str
    values: int  # in a block
    nbytes: int  # of a block
    quantize: Callable[[F32, F32 | None], U8]
    dequantize: Callable[[U8], F32]  # u8[n, bytes of a row] -> f32[n, in]

    def row_nbytes(self, width: int) -> int:
        """Bytes of a row of `width` values."""
        assert width % self.values == 0, (self.name, width)
        return width // self.values * self.nbytes


GGML_TYPES: dict[str, GgmlType] = {}
