"""llama.cpp's K-quants without minima: Q3_K and Q6_K.

Layouts are those of ggml-common.h, little-endian, 256 values in a block, in 16 sub-blocks of 16:

    Q3_K  110 bytes: the codes' third bits, 32 bytes; their low 2 bits, 64 bytes; 16 scales of 6 bits in 12 bytes;
          d fp16. value = d * (scale - 32) * (code - 4).
    Q6_K  210 bytes: the codes' low 4 bits, 128 bytes; their upper 2 bits, 64 bytes; 16 signed scales of a byte;
          d fp16. value = d * scale * (code - 32).

How these numbers are found is in symmetric_kernels. An error counts with ggml's own weights (ggml-quants.c): the square
of the value without importance; with importance, that itself in Q6_K and importance * sqrt(2 * mean square of the block
+ value^2) in Q3_K.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from converters.quantize.ggml.symmetric_kernels import WEIGH_BOTH, WEIGH_IMPORTANCE, Grid
from converters.quantize.ggml.symmetric_search import I8, SUPERBLOCK, Search, search_superblocks
from converters.quantize.half import fp16_at
from converters.quantize.tensor import F32, U8

_SIZE = 16  # values in a sub-block
_HALF = 128  # values whose codes' bits are interleaved
_RUN = 32  # values in a run of bytes
_Q3_K_NBYTES = 110
_Q6_K_NBYTES = 210

# Ends by greedy choice, each the one that lowers the errors of those before it most, over matrices of a language model,
# normal, Laplace and Student t (3 degrees) numbers, and sub-blocks of one sign. For Q6_K each further integer goes on
# lowering the weighted error, but those within 27 begin to raise the plain one; so do ends that clip more.
_Q3_K = Search(
    Grid(_SIZE, False, np.float32(-4), np.float32(3), np.float32(-32), np.float32(31)),
    WEIGH_BOTH,
    ends=np.array([-4.25, -3.125, -4, 4.375, -3.625], np.float32),
    clipping=np.array([-4.5, -4.875], np.float32),
)
_Q6_K = Search(
    Grid(_SIZE, False, np.float32(-32), np.float32(31), np.float32(-128), np.float32(127)),
    WEIGH_IMPORTANCE,
    ends=np.array([-32, -31, -30, -29, -28, -27], np.float32),
    clipping=np.array([], np.float32),
)


def quantize_q3_k(values: F32, importance: F32 | None = None) -> U8:
    """Blocks u8[n, in / 256 * 110] of rows f32[n, in]; `in` is a multiple of 256.

    importance: f32[in], positive: how much an error in each column counts.
    OverflowError if values are too large for an fp16 d.
    """
    d, scales, codes = search_superblocks(values, importance, _Q3_K)
    packed = np.zeros((len(codes), _Q3_K_NBYTES), np.uint8)
    packed[:, 108:] = d
    _pack_q3_k(codes, scales, packed)
    return packed.reshape(len(values), values.shape[1] // SUPERBLOCK * _Q3_K_NBYTES)


def quantize_q6_k(values: F32, importance: F32 | None = None) -> U8:
    """As quantize_q3_k, u8[n, in / 256 * 210]."""
    d, scales, codes = search_superblocks(values, importance, _Q6_K)
    packed = np.empty((len(codes), _Q6_K_NBYTES), np.uint8)
    packed[:, 192:208] = scales.view(np.uint8)
    packed[:, 208:] = d
    _pack_q6_k(codes, packed)
    return packed.reshape(len(values), values.shape[1] // SUPERBLOCK * _Q6_K_NBYTES)


def dequantize_q3_k(blocks: U8) -> F32:
    """f32[n, in] of u8[n, in / 256 * 110]: what dequantize_row_q3_K computes, bit for bit."""
    packed = np.ascontiguousarray(blocks).reshape(-1, _Q3_K_NBYTES)
    values = np.empty((len(packed), SUPERBLOCK), np.float32)
    _unpack_q3_k(packed, fp16_at(packed, 108), values)
    return values.reshape(len(blocks), blocks.shape[1] // _Q3_K_NBYTES * SUPERBLOCK)


def dequantize_q6_k(blocks: U8) -> F32:
    """f32[n, in] of u8[n, in / 256 * 210]: what dequantize_row_q6_K computes, bit for bit."""
    packed = np.ascontiguousarray(blocks).reshape(-1, _Q6_K_NBYTES)
    values = np.empty((len(packed), SUPERBLOCK), np.float32)
    _unpack_q6_k(packed, packed.view(np.int8), fp16_at(packed, 208), values)
    return values.reshape(len(blocks), blocks.shape[1] // _Q6_K_NBYTES * SUPERBLOCK)


@njit(cache=True, nogil=True)
def _pack_q3_k(codes: U8, scales: I8, packed: U8) -> None:  # pragma: no cover
    """All but d. packed: zeros u8[n, 110]; bytes 0-31 third bits, 32-95 low bits, 96-107 scales.

    Bit k of byte l of the third bits is that of value 32 k + l. Of a half's 128 values, l, l + 32, l + 64 and l + 96
    share a byte of low bits. Byte k of the scales has the low 4 bits of scales k and k + 8, byte 8 + k the upper 2 bits
    of scales k, k + 4, k + 8 and k + 12.
    """
    for block in range(codes.shape[0]):
        for run in range(SUPERBLOCK // _RUN):
            for j in range(_RUN):
                packed[block, j] |= np.uint8(np.uint8(codes[block, run * _RUN + j] >> 2) << run)
        for half in range(2):
            for j in range(_RUN):
                first = half * _HALF + j
                packed[block, 32 + half * _RUN + j] = np.uint8(
                    codes[block, first] & 3
                    | (codes[block, first + 32] & 3) << 2
                    | (codes[block, first + 64] & 3) << 4
                    | (codes[block, first + 96] & 3) << 6
                )
        for sub in range(16):
            scale = np.int32(scales[block, sub]) + 32
            packed[block, 96 + sub % 8] |= np.uint8((scale & 15) << (sub // 8 * 4))
            packed[block, 104 + sub % 4] |= np.uint8((scale >> 4) << (sub // 4 * 2))


@njit(cache=True, nogil=True)
def _unpack_q3_k(packed: U8, d: F32, values: F32) -> None:  # pragma: no cover
    for block in range(packed.shape[0]):
        for sub in range(16):
            low = (packed[block, 96 + sub % 8] >> (sub // 8 * 4)) & 15
            high = (packed[block, 104 + sub % 4] >> (sub // 4 * 2)) & 3
            scale = d[block] * np.float32(np.int32(low | high << 4) - 32)
            half, rest = divmod(sub * _SIZE, _HALF)
            run, first = divmod(rest, _RUN)
            for j in range(_SIZE):
                code = np.int32((packed[block, 32 + half * _RUN + first + j] >> (2 * run)) & 3)
                third = np.int32((packed[block, first + j] >> (half * 4 + run)) & 1)
                values[block, sub * _SIZE + j] = scale * np.float32(code + 4 * third - 4)


@njit(cache=True, nogil=True)
def _pack_q6_k(codes: U8, packed: U8) -> None:  # pragma: no cover
    """Bytes 0-127, low 4 bits, and 128-191, upper 2 bits, of u8[n, 210].

    Of a half's 128 values, l and l + 64 share a byte of low bits, as do l + 32 and l + 96; all four share one of upper
    bits.
    """
    for block in range(codes.shape[0]):
        for half in range(2):
            for j in range(_RUN):
                first = half * _HALF + j
                a, b = codes[block, first], codes[block, first + 32]
                c, d = codes[block, first + 64], codes[block, first + 96]
                packed[block, half * 64 + j] = np.uint8(a & 15 | (c & 15) << 4)
                packed[block, half * 64 + 32 + j] = np.uint8(b & 15 | (d & 15) << 4)
                packed[block, 128 + half * 32 + j] = np.uint8(a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6)


@njit(cache=True, nogil=True)
def _unpack_q6_k(packed: U8, signed: I8, d: F32, values: F32) -> None:  # pragma: no cover
    """packed and signed are the same bytes."""
    for block in range(packed.shape[0]):
        for sub in range(16):
            scale = d[block] * np.float32(signed[block, 192 + sub])
            half, rest = divmod(sub * _SIZE, _HALF)
            run, first = divmod(rest, _RUN)
            for j in range(_SIZE):
                low = np.int32((packed[block, half * 64 + run % 2 * 32 + first + j] >> (run // 2 * 4)) & 15)
                high = np.int32((packed[block, 128 + half * 32 + first + j] >> (2 * run)) & 3)
                values[block, sub * _SIZE + j] = scale * np.float32((low | high << 4) - 32)
