"""Packing into MLX's affine format: three functions, pure on a block of rows.

MLX computes `value = scales * code + biases` (mlx.core.quantize, mode "affine"). A row of codes is a row of u32 words,
32/bits codes in each, the first code in the lowest bits; stored little-endian, that is one byte a code at 8 bits and
two codes a byte, the first one low, at 4 bits. scales and biases are [out, groups] in one float type.

With `value = scale * (code - zero)` the bias is `-zero * scale`: a power of two times the scale where the tensor is
symmetric, and exact by the quantizer's contract where it is not.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from converters.errors import ModelError
from converters.quantize.tensor import U8, FloatArray, QuantTensor, Tensor
from exporters.nibbles import pack_nibbles

GROUP_SIZES = (128, 64, 32)  # what mlx.core.quantize accepts in affine mode and tundish makes

DTYPES: dict[str, np.dtype[Any]] = {
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def group_size_for(group_size: int, row: int) -> int | None:
    """The MLX group size that holds groups of `group_size` (0: the whole row of `row` elements) without change.

    The largest of 128, 64 and 32 that divides them; None if none does.
    """
    return next((size for size in GROUP_SIZES if (group_size or row) % size == 0), None)


def pack_codes(tensor: Tensor) -> U8:
    """Codes u8[n, in] of 4 or 8 bits -> u8[n * in * bits / 8], low bits first."""
    assert isinstance(tensor, QuantTensor)
    if tensor.bits == 8:
        return tensor.codes.reshape(-1)
    assert tensor.bits == 4, tensor.bits
    return pack_nibbles(tensor.codes).reshape(-1)


def pack_scales(tensor: Tensor, group_size: int, dtype: str) -> U8:
    """Scales of groups of `group_size` in `dtype` ("F16" or "F32") -> u8[n * in / group_size * itemsize]."""
    assert isinstance(tensor, QuantTensor)
    return _bytes(tensor.regroup(group_size).scale, dtype)


def pack_biases(tensor: Tensor, group_size: int, dtype: str) -> U8:
    """`-zero * scale` of groups of `group_size`, as pack_scales. ModelError if `dtype` cannot hold one exactly."""
    assert isinstance(tensor, QuantTensor)
    tensor = tensor.regroup(group_size)
    exact = -tensor.zeros().astype(np.float32) * tensor.scale.astype(np.float32)
    with np.errstate(over="ignore"):
        stored = exact.astype(DTYPES[dtype])
    wrong = stored.astype(np.float32) != exact
    if wrong.any():
        raise ModelError(
            "a bias -zero * scale does not fit the scales' float type exactly",
            where="MLX container",
            expected=f"a value that {dtype} holds",
            found=f"{exact[wrong][0]!r}",
            mend="Set the MLX target's activations to fp32, which stores scales and biases in float32.",
        )
    return _bytes(stored, dtype)


def _bytes(array: FloatArray, dtype: str) -> U8:
    return np.ascontiguousarray(array, DTYPES[dtype]).reshape(-1).view(np.uint8)
