"""Loops over single numbers: from a checkpoint's bits to float32, and from codes back to values."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numba import njit
from numpy.typing import NDArray

from converters.quantize.tensor import F32, U8, FloatArray


def widen(stored: FloatArray) -> tuple[F32, bool]:
    """Floats of any type as float32, of the same shape, and whether all of them are finite."""
    if stored.dtype == ml_dtypes.bfloat16:
        values, finite = _widen_bf16(np.ascontiguousarray(stored).reshape(-1).view(np.uint16))
        return values.reshape(stored.shape), finite
    values = stored.astype(np.float32, copy=False)
    return values, bool(np.isfinite(values).all())


@njit(cache=True, nogil=True)
def _widen_bf16(bits: NDArray[np.uint16]) -> tuple[F32, bool]:  # pragma: no cover
    """bfloat16 is the upper half of a float32; its exponent is all ones in NaN and Inf alone."""
    wide = np.empty(len(bits), np.uint32)
    bad = np.uint32(0)
    for i in range(len(bits)):
        wide[i] = np.uint32(bits[i]) << np.uint32(16)
        bad |= np.uint32((bits[i] & np.uint16(0x7F80)) == np.uint16(0x7F80))
    return wide.view(np.float32), bad == 0


@njit(cache=True, nogil=True)
def dequantize_codes(codes: U8, scale: F32, zero: U8) -> F32:  # pragma: no cover
    """f32[rows, groups, size] = scale * (code - zero), never -0; codes of that shape, scale and zero [rows, groups]."""
    values = np.empty(codes.shape, np.float32)
    for row in range(codes.shape[0]):
        for group in range(codes.shape[1]):
            factor, shift = scale[row, group], np.float32(zero[row, group])
            for j in range(codes.shape[2]):
                values[row, group, j] = factor * (np.float32(codes[row, group, j]) - shift) + np.float32(0)
    return values
