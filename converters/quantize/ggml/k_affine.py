"""llama.cpp's K-quants that store a scale and a minimum for each sub-block: Q2_K, Q4_K, Q5_K.

Layouts are those of ggml-common.h, little-endian, 256 values in a block:

    Q2_K   84 bytes: 16 x (scale | minimum << 4); codes, 2 bits, 64 bytes; d, dmin fp16. Sub-blocks of 16.
    Q4_K  144 bytes: d, dmin fp16; 8 scales and 8 minima of 6 bits in 12 bytes; codes, 4 bits, 128 bytes.
    Q5_K  176 bytes: d, dmin fp16; scales as in Q4_K; the codes' fifth bits, 32 bytes; their low 4 bits, 128 bytes.

value = d * scale * code - dmin * minimum; how these numbers are found is in k_affine_search.

An error counts with ggml's own weights (quantize_row_*_ref and quantize_*_K in ggml-quants.c): without importance, the
value's magnitude (Q2_K, and a little of what follows, so that zeros count) plus the root mean square of its sub-block
(Q4_K, Q5_K); with importance, importance * sqrt(mean square of the block, twice that in Q4_K and Q5_K, + value^2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from converters.quantize.ggml.k_affine_search import SUPERBLOCK, search
from converters.quantize.half import to_fp16
from converters.quantize.tensor import F32, U8

_HALVES = 4  # bytes of d and dmin


@dataclass(frozen=True, slots=True)
class _Format:
    name: str
    nbytes: int  # of a block
    size: int  # values in a sub-block
    top: int  # largest code
    levels: int  # largest integer scale or minimum
    halves: int  # where in a block d and dmin are
    ends: F32  # f32[candidates, 2]: see _search_tile in k_affine_search, as the next
    steps: F32


# Ends of the range, by greedy choice: each one is what lowers the error of those before it most, of all pairs on a grid
# of 0.15, half by ggml's weights and half under lognormal importances, over tensors of a language model and normal,
# Laplace and Student t (2 degrees) numbers.
_ENDS_2BIT = np.array(
    [
        (0.3, 0.3),
        (0.75, 0.0),
        (0.0, 0.6),
        (0.15, 0.0),
        (-0.15, 1.2),
        (-0.75, 0.15),
        (1.95, 0.45),
        (1.05, 1.2),
        (-0.15, 0.15),
        (0.3, -0.15),
        (2.1, 0.0),
        (0.6, 1.65),
        (0.0, 1.8),
        (1.65, 0.9),
        (0.15, 0.45),
        (1.2, 0.0),
    ],
    np.float32,
)
_ENDS_4BIT = np.array(
    [
        (0.3, 0.15),
        (-0.15, 0.45),
        (0.45, -0.15),
        (0.15, -0.9),
        (-0.75, -0.9),
        (0.0, 0.15),
        (1.35, 0.15),
        (0.75, 1.05),
        (0.15, 1.5),
        (0.0, -0.15),
        (-0.75, -0.15),
        (-0.15, -0.75),
        (2.1, -0.15),
        (-1.05, -0.75),
        (0.15, 2.1),
        (0.15, 1.05),
    ],
    np.float32,
)
_ENDS_5BIT = np.array(
    [
        (0.0, 0.0),
        (0.3, -0.75),
        (-0.9, -0.9),
        (0.45, -0.15),
        (-0.15, 0.3),
        (-0.15, -1.05),
        (0.15, 1.05),
        (0.75, 0.75),
        (-0.9, -0.3),
        (0.15, -0.15),
        (-0.75, -1.05),
        (1.5, 0.15),
        (-1.05, -0.75),
        (0.3, 2.1),
        (-0.15, -0.75),
        (2.1, 0.15),
    ],
    np.float32,
)
# d and dmin are tried at the largest scale and minimum over 15 or 63 + these. A negative one leaves the largest
# integers unused: what counts is how well all numbers of a superblock fall on the grid.
_STEPS_4BIT = np.array([-4, -2, -1, -0.5, 0, 0.5], np.float32)
_STEPS_6BIT = np.array([-7, -4, -2, -1, 0, 0.7], np.float32)

_Q2_K = _Format("q2_k", 84, 16, 3, 15, 80, _ENDS_2BIT, _STEPS_4BIT)
_Q4_K = _Format("q4_k", 144, 32, 15, 63, 0, _ENDS_4BIT, _STEPS_6BIT)
_Q5_K = _Format("q5_k", 176, 32, 31, 63, 0, _ENDS_5BIT, _STEPS_6BIT)


def quantize_q2_k(values: F32, importance: F32 | None = None) -> U8:
    """Blocks u8[n, in / 256 * 84] of rows f32[n, in]; `in` is a multiple of 256.

    importance: f32[in], positive: how much an error in each column counts. None: all the same.
    OverflowError if values are too large for fp16 factors.
    """
    return _quantize(_Q2_K, values, importance)


def quantize_q4_k(values: F32, importance: F32 | None = None) -> U8:
    """As quantize_q2_k, u8[n, in / 256 * 144]."""
    return _quantize(_Q4_K, values, importance)


def quantize_q5_k(values: F32, importance: F32 | None = None) -> U8:
    """As quantize_q2_k, u8[n, in / 256 * 176]."""
    return _quantize(_Q5_K, values, importance)


def dequantize_q2_k(blocks: U8) -> F32:
    """f32[n, in] of u8[n, in / 256 * 84], what dequantize_row_q2_K computes."""
    return _dequantize(_Q2_K, blocks)


def dequantize_q4_k(blocks: U8) -> F32:
    """f32[n, in] of u8[n, in / 256 * 144], what dequantize_row_q4_K computes."""
    return _dequantize(_Q4_K, blocks)


def dequantize_q5_k(blocks: U8) -> F32:
    """f32[n, in] of u8[n, in / 256 * 176], what dequantize_row_q5_K computes."""
    return _dequantize(_Q5_K, blocks)


def _quantize(form: _Format, values: F32, importance: F32 | None) -> U8:
    rows, width = values.shape
    assert width % SUPERBLOCK == 0, (form.name, values.shape)
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, SUPERBLOCK)
    counts = np.empty((0, SUPERBLOCK), np.float32)
    if importance is not None:
        # Only proportions within a block matter; these keep products of two sums within float32.
        counts = np.ascontiguousarray(importance, np.float32).reshape(-1, SUPERBLOCK)
        counts = counts / counts.max(axis=1, keepdims=True)
    factors, integers, codes = search(blocks, counts, form.size, form.top, form.levels, form.ends, form.steps)
    halves = to_fp16(factors, values, f"a {form.name} factor")
    out = np.empty((len(blocks), form.nbytes), np.uint8)
    out[:, form.halves : form.halves + _HALVES] = halves.view(np.uint8)
    _PACK[form.name](integers, codes, out)
    return out.reshape(rows, width // SUPERBLOCK * form.nbytes)


def _dequantize(form: _Format, blocks: U8) -> F32:
    rows, nbytes = blocks.shape
    assert nbytes % form.nbytes == 0, (form.name, blocks.shape)
    packed = np.ascontiguousarray(blocks).reshape(-1, form.nbytes)
    halves = np.ascontiguousarray(packed[:, form.halves : form.halves + _HALVES]).view("<f2")
    integers = np.empty((len(packed), 2, SUPERBLOCK // form.size), np.uint8)
    codes = np.empty((len(packed), SUPERBLOCK), np.uint8)
    _UNPACK[form.name](packed, integers, codes)
    return _values(halves.astype(np.float32), integers, codes).reshape(rows, -1)


@njit(cache=True, nogil=True)
def _values(factors: F32, integers: U8, codes: U8) -> F32:  # pragma: no cover
    """f32[n, 256]; the product of d, scale and code is exact in float32, so that one rounding is left."""
    out = np.empty(codes.shape, np.float32)
    subs = integers.shape[2]
    size = SUPERBLOCK // subs
    for block in range(codes.shape[0]):
        for sub in range(subs):
            scale = factors[block, 0] * np.float32(integers[block, 0, sub])
            minimum = factors[block, 1] * np.float32(integers[block, 1, sub])
            for j in range(sub * size, sub * size + size):
                out[block, j] = scale * np.float32(codes[block, j]) - minimum
    return out


@njit(cache=True, nogil=True)
def _pack_q2_k(integers: U8, codes: U8, out: U8) -> None:  # pragma: no cover
    for block in range(codes.shape[0]):
        for sub in range(16):
            out[block, sub] = integers[block, 0, sub] | integers[block, 1, sub] << 4
        for half in range(2):
            source = codes[block, 128 * half : 128 * half + 128]
            target = out[block, 16 + 32 * half : 48 + 32 * half]
            for j in range(32):
                target[j] = source[j] | source[j + 32] << 2 | source[j + 64] << 4 | source[j + 96] << 6


@njit(cache=True, nogil=True)
def _unpack_q2_k(packed: U8, integers: U8, codes: U8) -> None:  # pragma: no cover
    for block in range(codes.shape[0]):
        for sub in range(16):
            integers[block, 0, sub], integers[block, 1, sub] = packed[block, sub] & 15, packed[block, sub] >> 4
        for half in range(2):
            for part in range(4):
                for j in range(32):
                    codes[block, 128 * half + 32 * part + j] = packed[block, 16 + 32 * half + j] >> 2 * part & 3


@njit(cache=True, nogil=True)
def _pack_q4_k(integers: U8, codes: U8, out: U8) -> None:  # pragma: no cover
    for block in range(codes.shape[0]):
        _pack_integers(integers[block, 0], integers[block, 1], out[block, 4:16])
        _pack_nibbles(codes[block], out[block, 16:144])


@njit(cache=True, nogil=True)
def _unpack_q4_k(packed: U8, integers: U8, codes: U8) -> None:  # pragma: no cover
    for block in range(codes.shape[0]):
        _unpack_integers(packed[block, 4:16], integers[block, 0], integers[block, 1])
        _unpack_nibbles(packed[block, 16:144], codes[block])


@njit(cache=True, nogil=True)
def _pack_q5_k(integers: U8, codes: U8, out: U8) -> None:  # pragma: no cover
    for block in range(codes.shape[0]):
        _pack_integers(integers[block, 0], integers[block, 1], out[block, 4:16])
        _pack_nibbles(codes[block], out[block, 48:176])
        source, fifth = codes[block], out[block, 16:48]
        fifth[:] = 0
        for sub in range(8):
            for j in range(32):
                fifth[j] |= source[32 * sub + j] >> 4 << sub


@njit(cache=True, nogil=True)
def _unpack_q5_k(packed: U8, integers: U8, codes: U8) -> None:  # pragma: no cover
    for block in range(codes.shape[0]):
        _unpack_integers(packed[block, 4:16], integers[block, 0], integers[block, 1])
        _unpack_nibbles(packed[block, 48:176], codes[block])
        for sub in range(8):
            for j in range(32):
                codes[block, 32 * sub + j] |= (packed[block, 16 + j] >> sub & 1) << 4


@njit(cache=True, nogil=True)
def _pack_nibbles(codes: U8, out: U8) -> None:  # pragma: no cover
    """Low 4 bits of u8[256] into u8[128]: each 32 bytes have two sub-blocks, the second one in the high nibbles."""
    for pair in range(4):
        source, target = codes[64 * pair : 64 * pair + 64], out[32 * pair : 32 * pair + 32]
        for j in range(32):
            target[j] = source[j] & 15 | source[j + 32] << 4


@njit(cache=True, nogil=True)
def _unpack_nibbles(packed: U8, codes: U8) -> None:  # pragma: no cover
    for pair in range(4):
        source, target = packed[32 * pair : 32 * pair + 32], codes[64 * pair : 64 * pair + 64]
        for j in range(32):
            target[j], target[j + 32] = source[j] & 15, source[j] >> 4


@njit(cache=True, nogil=True)
def _pack_integers(scales: U8, minima: U8, out: U8) -> None:  # pragma: no cover
    """u8[8] and u8[8] of 6 bits into u8[12].

    Bytes 0-3: scales 0-3, 4-7: minima 0-3; their top two bits are the top two of the number four further on. Bytes
    8-11: low 4 bits of scales 4-7 | of minima 4-7 << 4 (get_scale_min_k4 in ggml-quants.c reads them).
    """
    for j in range(4):
        out[j] = scales[j] | scales[j + 4] >> 4 << 6
        out[j + 4] = minima[j] | minima[j + 4] >> 4 << 6
        out[j + 8] = scales[j + 4] & 15 | minima[j + 4] << 4


@njit(cache=True, nogil=True)
def _unpack_integers(packed: U8, scales: U8, minima: U8) -> None:  # pragma: no cover
    for j in range(4):
        scales[j], minima[j] = packed[j] & 63, packed[j + 4] & 63
        scales[j + 4] = packed[j + 8] & 15 | packed[j] >> 6 << 4
        minima[j + 4] = packed[j + 8] >> 4 | packed[j + 4] >> 6 << 4


_PACK = {"q2_k": _pack_q2_k, "q4_k": _pack_q4_k, "q5_k": _pack_q5_k}
_UNPACK = {"q2_k": _unpack_q2_k, "q4_k": _unpack_q4_k, "q5_k": _unpack_q5_k}
