"""Packing of canonical tensors into OpenVINO's element types: pure functions on blocks of rows.

4-bit elements share a byte, the first one in the low nibble; i4 and i8 are two's complement
(https://docs.openvino.ai/2025/documentation/openvino-ir-format/operation-sets/element-types.html).
Each function returns u8[rows * row_nbytes] of a constant whose rows start at whole bytes.
"""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np

from converters.quantize.tensor import U8, QuantTensor, Tensor
from exporters.floats import pack_floats
from exporters.nibbles import pack_nibbles


def pack_i4(tensor: Tensor) -> U8:
    """codes [rows, in] with zero 8 as signed nibbles: code - 8 in two's complement is the code, top bit flipped."""
    assert isinstance(tensor, QuantTensor)
    return pack_nibbles(tensor.codes, flip=8).reshape(-1)


def pack_u4(tensor: Tensor) -> U8:
    """codes [rows, in] as they are."""
    assert isinstance(tensor, QuantTensor)
    return pack_nibbles(tensor.codes).reshape(-1)


def pack_i8(tensor: Tensor) -> U8:
    """codes [rows, in] with zero 128 as signed bytes: the top bit flipped."""
    assert isinstance(tensor, QuantTensor)
    return (tensor.codes ^ np.uint8(128)).reshape(-1)


def pack_u8(tensor: Tensor) -> U8:
    """codes [rows, in] as they are."""
    assert isinstance(tensor, QuantTensor)
    return tensor.codes.reshape(-1)


def pack_scale(tensor: Tensor) -> U8:
    """scale [rows, groups] in little-endian fp16."""
    assert isinstance(tensor, QuantTensor)
    return np.ascontiguousarray(tensor.scale, "<f2").view(np.uint8).reshape(-1)


def pack_zero_u4(tensor: Tensor) -> U8:
    """zero [rows, groups], an even number of groups, two to a byte."""
    assert isinstance(tensor, QuantTensor)
    return pack_nibbles(tensor.zeros()).reshape(-1)


def pack_zero_u8(tensor: Tensor) -> U8:
    """zero [rows, groups], a byte each."""
    assert isinstance(tensor, QuantTensor)
    return np.ascontiguousarray(tensor.zeros()).reshape(-1)


pack_f32 = partial(pack_floats, dtype=np.dtype("<f4"), where="target openvino")
pack_f16 = partial(pack_floats, dtype=np.dtype("<f2"), where="target openvino")
pack_bf16 = partial(pack_floats, dtype=np.dtype(ml_dtypes.bfloat16), where="target openvino")
