"""llama.cpp's block types: how many values and bytes a block has, how rows get into blocks and back.

Block layouts are those of ggml-common.h. Quantizers take rows f32[n, in] and the importance f32[in] of their columns
(or None: ggml's own weights for that case) and return u8[n, bytes of a row]; dequantizers return the exact float32
values that ggml's dequantize_row_* compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from converters.quantize.ggml import iq4, k_affine, k_symmetric, plain
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


GGML_TYPES: dict[str, GgmlType] = {
    kind.name: kind
    for kind in (
        GgmlType("q4_0", 32, 18, plain.quantize_q4_0, plain.dequantize_q4_0),
        GgmlType("q4_1", 32, 20, plain.quantize_q4_1, plain.dequantize_q4_1),
        GgmlType("q5_0", 32, 22, plain.quantize_q5_0, plain.dequantize_q5_0),
        GgmlType("q5_1", 32, 24, plain.quantize_q5_1, plain.dequantize_q5_1),
        GgmlType("q8_0", 32, 34, plain.quantize_q8_0, plain.dequantize_q8_0),
        GgmlType("q2_k", 256, 84, k_affine.quantize_q2_k, k_affine.dequantize_q2_k),
        GgmlType("q3_k", 256, 110, k_symmetric.quantize_q3_k, k_symmetric.dequantize_q3_k),
        GgmlType("q4_k", 256, 144, k_affine.quantize_q4_k, k_affine.dequantize_q4_k),
        GgmlType("q5_k", 256, 176, k_affine.quantize_q5_k, k_affine.dequantize_q5_k),
        GgmlType("q6_k", 256, 210, k_symmetric.quantize_q6_k, k_symmetric.dequantize_q6_k),
        GgmlType("iq4_nl", 32, 18, iq4.quantize_iq4_nl, iq4.dequantize_iq4_nl),
        GgmlType("iq4_xs", 256, 136, iq4.quantize_iq4_xs, iq4.dequantize_iq4_xs),
    )
}
