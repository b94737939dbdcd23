"""llama.cpp's block types with a codebook of 16 uneven numbers: IQ4_NL and IQ4_XS.

Layouts are those of ggml-common.h, little-endian; the codebook is its kvalues_iq4nl:

    IQ4_NL   18 bytes of 32 values: d fp16; codes, 16 bytes. value = d * codebook[code].
    IQ4_XS  136 bytes of 256 values in 8 sub-blocks of 32: d fp16; the upper 2 bits of 8 scales, 2 bytes; their low 4
            bits, 4 bytes; codes, 128 bytes. value = d * (scale - 32) * codebook[code].

How these numbers are found is in symmetric_kernels. An error counts with ggml's own weights
(quantize_row_iq4_nl_impl in ggml-quants.c): the square of the value without importance;
importance * sqrt(2 * mean square of the block + value^2) with it.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from converters.quantize.ggml.symmetric_kernels import CODEBOOK, WEIGH_BOTH, Grid
from converters.quantize.ggml.symmetric_search import (
    I8,
    SUPERBLOCK,
    Search,
    search_blocks,
    search_superblocks,
)
from converters.quantize.half import fp16_at
from converters.quantize.tensor import F32, U8

_SIZE = 32  # values in a block of IQ4_NL and in a sub-block of IQ4_XS
_HALF = 16
_NL_NBYTES = 18
_XS_NBYTES = 136
_NUMBERS = np.array(CODEBOOK, np.float32)

# Ends by greedy choice, each the one that lowers the errors of those before it most, over matrices of a language model,
# normal, Laplace and Student t (3 degrees) numbers, and blocks of one sign. Ends further in or out go on lowering the
# weighted error, but begin to raise the plain one.
_SEARCH = Search(
    Grid(_SIZE, True, np.float32(0), np.float32(0), np.float32(-32), np.float32(31)),
    WEIGH_BOTH,
    ends=np.array([-127, 114, -106, -121, -133, -142], np.float32),
    clipping=np.array([129], np.float32),
)


def quantize_iq4_nl(values: F32, importance: F32 | None = None) -> U8:
    """Blocks u8[n, in / 32 * 18] of rows f32[n, in]; `in` is a multiple of 32.

    importance: f32[in], positive: how much an error in each column counts.
    OverflowError if values are too large for an fp16 d.
    """
    d, codes = search_blocks(values, importance, _SEARCH)
    packed = np.empty((len(codes), _NL_NBYTES), np.uint8)
    packed[:, :2] = d
    _pack_codes(codes, packed, 2)
    return packed.reshape(len(values), values.shape[1] // _SIZE * _NL_NBYTES)


def quantize_iq4_xs(values: F32, importance: F32 | None = None) -> U8:
    """As quantize_iq4_nl, u8[n, in / 256 * 136]; `in` is a multiple of 256."""
    d, scales, codes = search_superblocks(values, importance, _SEARCH)
    packed = np.zeros((len(codes), _XS_NBYTES), np.uint8)
    packed[:, :2] = d
    _pack_scales(scales, packed)
    _pack_codes(codes, packed, 8)
    return packed.reshape(len(values), values.shape[1] // SUPERBLOCK * _XS_NBYTES)


def dequantize_iq4_nl(blocks: U8) -> F32:
    """f32[n, in] of u8[n, in / 32 * 18]: what dequantize_row_iq4_nl computes, bit for bit."""
    packed = np.ascontiguousarray(blocks).reshape(-1, _NL_NBYTES)
    values = np.empty((len(packed), _SIZE), np.float32)
    _unpack_codes(packed, 2, fp16_at(packed, 0)[:, None], _NUMBERS, values)
    return values.reshape(len(blocks), blocks.shape[1] // _NL_NBYTES * _SIZE)


def dequantize_iq4_xs(blocks: U8) -> F32:
    """f32[n, in] of u8[n, in / 256 * 136]: what dequantize_row_iq4_xs computes, bit for bit."""
    packed = np.ascontiguousarray(blocks).reshape(-1, _XS_NBYTES)
    values = np.empty((len(packed), SUPERBLOCK), np.float32)
    _unpack_codes(packed, 8, fp16_at(packed, 0)[:, None] * _scales(packed), _NUMBERS, values)
    return values.reshape(len(blocks), blocks.shape[1] // _XS_NBYTES * SUPERBLOCK)


def _scales(packed: U8) -> F32:
    """The integers f32[n, 8] that sub-blocks' scales are, in -32 ... 31."""
    low = np.stack([packed[:, 4:8] & 15, packed[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    upper = packed[:, 2:4].copy().view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & np.uint16(3)
    scales: F32 = (low | upper.astype(np.uint8) << 4).astype(np.float32) - np.float32(32)
    return scales


@njit(cache=True, nogil=True)
def _pack_scales(scales: I8, packed: U8) -> None:  # pragma: no cover
    """Bytes 2-7 of zeros u8[n, 136]: 8 x 2 upper bits, then 8 x 4 low bits, the first scale's lowest."""
    for block in range(scales.shape[0]):
        for sub in range(8):
            scale = np.int32(scales[block, sub]) + 32
            packed[block, 2 + sub // 4] |= np.uint8((scale >> 4) << (sub % 4 * 2))
            packed[block, 4 + sub // 2] |= np.uint8((scale & 15) << (sub % 2 * 4))


@njit(cache=True, nogil=True)
def _pack_codes(codes: U8, packed: U8, start: int) -> None:  # pragma: no cover
    """From byte `start` on: of 32 codes, j and j + 16 share a byte."""
    for block in range(codes.shape[0]):
        for first in range(0, codes.shape[1], _SIZE):
            at = start + first // 2
            for j in range(_HALF):
                packed[block, at + j] = np.uint8(codes[block, first + j] | codes[block, first + j + _HALF] << 4)


@njit(cache=True, nogil=True)
def _unpack_codes(packed: U8, start: int, scales: F32, numbers: F32, values: F32) -> None:  # pragma: no cover
    """scales: f32[n, values of a block / 32]."""
    for block in range(packed.shape[0]):
        for sub in range(scales.shape[1]):
            scale = scales[block, sub]
            at = start + sub * _HALF
            for j in range(_HALF):
                both = packed[block, at + j]
                values[block, sub * _SIZE + j] = scale * numbers[both & 15]
                values[block, sub * _SIZE + j + _HALF] = scale * numbers[both >> 4]
