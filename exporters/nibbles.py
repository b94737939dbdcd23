"""Two 4-bit codes to a byte, the first one low: how ONNX Runtime, OpenVINO and MLX all store them."""

from __future__ import annotations

import numpy as np
from numba import njit

from converters.quantize.tensor import U8


def pack_nibbles(codes: U8, flip: int = 0) -> U8:
    """u8[rows, n] of 0 ... 15 -> u8[rows, ceil(n / 2)]; an odd row ends in a zero nibble.

    Each code is xored with `flip`: 8 turns codes with zero 8 into two's complement.
    """
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
        assert not flip, "the padding would be flipped too"
    return _pack(np.ascontiguousarray(codes), np.uint8(flip | flip << 4))


def unpack_nibbles(packed: U8, count: int) -> U8:
    """u8[rows, bytes] -> u8[rows, count], the inverse of pack_nibbles."""
    halves = np.stack([packed & 15, packed >> 4], axis=-1)
    return halves.reshape(packed.shape[0], -1)[:, :count]


@njit(cache=True, nogil=True)
def _pack(codes: U8, flip: np.uint8) -> U8:  # pragma: no cover
    rows, width = codes.shape
    packed = np.empty((rows, width // 2), np.uint8)
    for row in range(rows):
        for i in range(width // 2):
            packed[row, i] = (codes[row, 2 * i] | codes[row, 2 * i + 1] << np.uint8(4)) ^ flip
    return packed
