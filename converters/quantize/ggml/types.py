"""llama.cpp's block types: how rows get into blocks and back.

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
    """How rows get into blocks of a type, and back."""

    quantize: Callable[[F32, F32 | None], U8]
    dequantize: Callable[[U8], F32]  # u8[n, bytes of a row] -> f32[n, in]


GGML_TYPES: dict[str, GgmlType] = {  # by the name of their scheme
    "q4_0": GgmlType(plain.quantize_q4_0, plain.dequantize_q4_0),
    "q4_1": GgmlType(plain.quantize_q4_1, plain.dequantize_q4_1),
    "q5_0": GgmlType(plain.quantize_q5_0, plain.dequantize_q5_0),
    "q5_1": GgmlType(plain.quantize_q5_1, plain.dequantize_q5_1),
    "q8_0": GgmlType(plain.quantize_q8_0, plain.dequantize_q8_0),
    "q2_k": GgmlType(k_affine.quantize_q2_k, k_affine.dequantize_q2_k),
    "q3_k": GgmlType(k_symmetric.quantize_q3_k, k_symmetric.dequantize_q3_k),
    "q4_k": GgmlType(k_affine.quantize_q4_k, k_affine.dequantize_q4_k),
    "q5_k": GgmlType(k_affine.quantize_q5_k, k_affine.dequantize_q5_k),
    "q6_k": GgmlType(k_symmetric.quantize_q6_k, k_symmetric.dequantize_q6_k),
    "iq4_nl": GgmlType(iq4.quantize_iq4_nl, iq4.dequantize_iq4_nl),
    "iq4_xs": GgmlType(iq4.quantize_iq4_xs, iq4.dequantize_iq4_xs),
}
