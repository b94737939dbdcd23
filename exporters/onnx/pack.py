"""Packing for MatMulNBits and GatherBlockQuantized.

Layout: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
B is u8[N, K / block, block * bits / 8], for 4 bits two codes a byte, the even one in the low half. scales is
[N, K / block] in the activations' type. zero_points is u8[N, ceil(K / block * bits / 8)], packed like B, each row
padded to whole bytes; without it zero is 2**(bits-1). Blocks never pad, since every group size here divides K.
GatherBlockQuantized reads the same bytes as u8[vocab, hidden * bits / 8].
"""

from __future__ import annotations

import numpy as np

from converters.quantize.tensor import U8, QuantTensor
from exporters.nibbles import pack_nibbles


def pack_codes(tensor: QuantTensor) -> U8:
    """u8[n * in * bits / 8]: input B."""
    codes = pack_nibbles(tensor.codes) if tensor.bits == 4 else tensor.codes
    return codes.reshape(-1)


def pack_scales(tensor: QuantTensor, block: int, dtype: np.dtype) -> U8:
    """u8[n * in / block * itemsize]: input scales. fp16 or fp32, which hold fp16 scales exactly."""
    scale = tensor.regroup(block).scale.astype(dtype)
    return np.ascontiguousarray(scale).reshape(-1).view(np.uint8)


def pack_zeros(tensor: QuantTensor, block: int) -> U8:
    """u8[n * ceil(in / block * bits / 8)]: input zero_points."""
    zeros = tensor.regroup(block).zeros()
    return (pack_nibbles(zeros) if tensor.bits == 4 else np.ascontiguousarray(zeros)).reshape(-1)
