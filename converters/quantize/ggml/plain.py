"""ggml's plain block types: 32 values share a scale (Q4_0, Q5_0, Q8_0), or a scale and a minimum (Q4_1, Q5_1).

Layouts are those of ggml-common.h, all little-endian:

    Q4_0  fp16 d, 16 bytes of codes                       value = d * (code - 8)
    Q4_1  fp16 d, fp16 m, 16 bytes of codes               value = d * code + m
    Q5_0  fp16 d, u32 of fifth bits, 16 bytes of codes    value = d * (code - 16)
    Q5_1  fp16 d, fp16 m, u32 of fifth bits, 16 bytes     value = d * code + m
    Q8_0  fp16 d, 32 signed bytes                         value = d * code

Byte j of the codes holds the low four bits of value j (low) and of value j + 16 (high); bit j of the fifth bits belongs
to value j.

Without an importance the bytes are those of ggml's quantize_row_*_ref on x86-64, where no product is fused into a sum.
With one, scales are searched (plain_search) and codes rounded against the stored scale; Q8_0 ignores it, as in ggml.
Every block is computed by itself in a fixed order, so results do not depend on how a matrix is cut.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from converters.quantize.ggml.plain_search import refit_affine, search_affine, search_symmetric
from converters.quantize.half import fp16_at, to_fp16
from converters.quantize.tensor import F32, U8

BLOCK = 32
_HALF = BLOCK // 2
_MAGNITUDE = 0x7FFFFFFF  # of a float32: all bits but the sign's

I32 = NDArray[np.int32]


def quantize_q4_0(values: F32, importance: F32 | None = None) -> U8:
    """f32[n, in] -> u8[n, in/32 * 18]. OverflowError if a scale does not fit fp16."""
    return _quantize_symmetric(values, importance, 4)


def quantize_q5_0(values: F32, importance: F32 | None = None) -> U8:
    """f32[n, in] -> u8[n, in/32 * 22]. OverflowError if a scale does not fit fp16."""
    return _quantize_symmetric(values, importance, 5)


def quantize_q4_1(values: F32, importance: F32 | None = None) -> U8:
    """f32[n, in] -> u8[n, in/32 * 20]. OverflowError if a scale or a minimum does not fit fp16."""
    return _quantize_affine(values, importance, 4)


def quantize_q5_1(values: F32, importance: F32 | None = None) -> U8:
    """f32[n, in] -> u8[n, in/32 * 24]. OverflowError if a scale or a minimum does not fit fp16."""
    return _quantize_affine(values, importance, 5)


def quantize_q8_0(values: F32, importance: F32 | None = None) -> U8:
    """f32[n, in] -> u8[n, in/32 * 34]; the importance changes nothing. OverflowError if a scale does not fit fp16."""
    blocks = _blocks(values)
    scale = _magnitudes(blocks.view(np.int32)).view(np.float32) / np.float32(127)
    out = np.empty((len(blocks), 2 + BLOCK), np.uint8)
    _put_fp16(out, 0, scale, values)
    _write_bytes(blocks, _inverse(scale), out.view(np.int8))
    return out.reshape(len(values), -1)


def dequantize_q4_0(blocks: U8) -> F32:
    """u8[n, in/32 * 18] -> f32[n, in]."""
    return _dequantize(blocks, 4, symmetric=True)


def dequantize_q5_0(blocks: U8) -> F32:
    """u8[n, in/32 * 22] -> f32[n, in]."""
    return _dequantize(blocks, 5, symmetric=True)


def dequantize_q4_1(blocks: U8) -> F32:
    """u8[n, in/32 * 20] -> f32[n, in]."""
    return _dequantize(blocks, 4, symmetric=False)


def dequantize_q5_1(blocks: U8) -> F32:
    """u8[n, in/32 * 24] -> f32[n, in]."""
    return _dequantize(blocks, 5, symmetric=False)


def dequantize_q8_0(blocks: U8) -> F32:
    """u8[n, in/32 * 34] -> f32[n, in]."""
    packed = blocks.reshape(-1, 2 + BLOCK)
    out = np.empty((len(packed), BLOCK), np.float32)
    _expand_bytes(packed.view(np.int8), fp16_at(packed, 0), out)
    return out.reshape(len(blocks), -1)


def _quantize_symmetric(values: F32, importance: F32 | None, bits: int) -> U8:
    blocks = _blocks(values)
    half = 1 << (bits - 1)
    out = np.empty((len(blocks), _header(bits, symmetric=True) + _HALF), np.uint8)
    scale = _extremes(blocks.view(np.int32)).view(np.float32) / np.float32(-half)
    _put_fp16(out, 0, scale, values)  # also before a search: what fits fp16 cannot overflow its sums
    if importance is not None:
        scale = _put_fp16(out, 0, search_symmetric(values, importance, half), values)
    low = np.zeros_like(scale)
    _write_codes(blocks, low, _inverse(scale), np.float32(half + 0.5), bits, out)
    return out.reshape(len(values), -1)


def _quantize_affine(values: F32, importance: F32 | None, bits: int) -> U8:
    blocks = _blocks(values)
    top = (1 << bits) - 1
    out = np.empty((len(blocks), _header(bits, symmetric=False) + _HALF), np.uint8)
    low, high = (end.view(np.float32) for end in _ranges(blocks.view(np.int32)))
    with np.errstate(over="ignore"):
        scale = (high - low) / np.float32(top)
    _put_fp16(out, 0, scale, values)  # also before a search: what fits fp16 cannot overflow its sums
    _put_fp16(out, 2, low, values)
    if importance is not None:
        scale, least = search_affine(values, importance, top)
        low = _put_fp16(out, 2, least, values)
        scale = _put_fp16(out, 0, refit_affine(values, importance, scale, low, top), values)
    _write_codes(blocks, low, _inverse(scale), np.float32(0.5), bits, out)
    return out.reshape(len(values), -1)


def _dequantize(blocks: U8, bits: int, *, symmetric: bool) -> F32:
    header = _header(bits, symmetric=symmetric)
    packed = blocks.reshape(-1, header + _HALF)
    scale = fp16_at(packed, 0)
    low = np.zeros_like(scale) if symmetric else fp16_at(packed, 2)
    out = np.empty((len(packed), BLOCK), np.float32)
    _expand_codes(packed, scale, low, 1 << (bits - 1) if symmetric else 0, bits, out)
    return out.reshape(len(blocks), -1)


def _header(bits: int, *, symmetric: bool) -> int:
    """Bytes of a block before its codes: scale, minimum, fifth bits."""
    return 2 + (0 if symmetric else 2) + (4 if bits == 5 else 0)


def _blocks(values: F32) -> F32:
    assert values.dtype == np.float32 and values.shape[1] % BLOCK == 0, values.shape
    return np.ascontiguousarray(values).reshape(-1, BLOCK)


def _inverse(scale: F32) -> F32:
    """1/scale, or 0 for 0; infinite for scales of 2**-128 and less."""
    inverse = np.zeros_like(scale)
    with np.errstate(over="ignore"):
        np.divide(np.float32(1), scale, out=inverse, where=scale != 0)
    return inverse


def _put_fp16(out: U8, at: int, numbers: F32, values: F32) -> F32:
    """Store f32[blocks] as fp16 at a byte of each block, and return what was stored."""
    stored = to_fp16(numbers, values)
    out[:, at : at + 2] = stored[:, None].view(np.uint8)
    return stored.astype(np.float32)


# The order of floats is that of their bits as integers, once those of negative ones are turned round. Integer maxima
# may be taken in any order, so LLVM vectorizes them; it may not for floats.


@njit(cache=True, nogil=True)
def _magnitudes(bits: I32) -> I32:  # pragma: no cover
    """The bits of each block's largest absolute value."""
    out = np.empty(bits.shape[0], np.int32)
    for block in range(bits.shape[0]):
        most = np.int32(0)
        for j in range(BLOCK):
            most = max(most, np.int32(bits[block, j] & _MAGNITUDE))
        out[block] = most
    return out


@njit(cache=True, nogil=True)
def _extremes(bits: I32) -> I32:  # pragma: no cover
    """The bits of each block's value of largest magnitude with its sign: the first of equals, and +0 if all are 0."""
    out = np.empty(bits.shape[0], np.int32)
    for block in range(bits.shape[0]):
        above = np.int32(-1)  # magnitude of the largest positive value, -1 if there is none
        below = np.int32(-1)
        for j in range(BLOCK):
            value = bits[block, j]
            magnitude = np.int32(value & _MAGNITUDE)
            above = max(above, value)
            below = max(below, magnitude if value < 0 else np.int32(-1))
        out[block] = above if above > below else np.int32(below | ~np.int32(_MAGNITUDE))
        if below == 0 and above <= 0:
            out[block] = 0
        elif above == below:
            for j in range(BLOCK):
                if np.int32(bits[block, j] & _MAGNITUDE) == above:
                    out[block] = bits[block, j]
                    break
    return out


@njit(cache=True, nogil=True)
def _ranges(bits: I32) -> tuple[I32, I32]:  # pragma: no cover
    """The bits of each block's smallest and largest value; of a zero minimum, the sign is the first zero's."""
    low = np.empty(bits.shape[0], np.int32)
    high = np.empty(bits.shape[0], np.int32)
    for block in range(bits.shape[0]):
        least = np.int32(_MAGNITUDE)
        most = np.int32(-_MAGNITUDE)
        for j in range(BLOCK):
            value = bits[block, j]
            key = np.int32(value ^ ((value >> 31) & _MAGNITUDE))
            least = min(least, key)
            most = max(most, key)
        low[block] = np.int32(least ^ ((least >> 31) & _MAGNITUDE))
        high[block] = np.int32(most ^ ((most >> 31) & _MAGNITUDE))
        if low[block] & _MAGNITUDE == 0:
            for j in range(BLOCK):
                if bits[block, j] & _MAGNITUDE == 0:
                    low[block] = bits[block, j]
                    break
    return low, high


@njit(cache=True, nogil=True)
def _write_codes(
    blocks: F32, low: F32, inverse: F32, offset: np.float32, bits: int, out: U8
) -> None:  # pragma: no cover
    """Codes trunc((x - low) * inverse + offset), clamped, into the last 16 bytes and the 4 of fifth bits before them.

    An infinite inverse gives codes of 0: the result of ggml's conversion to int8 there, and its scale is stored as 0.
    """
    top = np.int32((1 << bits) - 1)
    start = out.shape[1] - _HALF
    zero = np.float32(0)
    for block in range(blocks.shape[0]):
        least, inv = low[block], inverse[block]
        if not np.isfinite(inv):
            out[block, start - 4 if bits == 5 else start :] = 0
            continue
        fifth = np.uint32(0)
        for j in range(_HALF):
            first = max((blocks[block, j] - least) * inv + offset, zero)
            second = max((blocks[block, j + _HALF] - least) * inv + offset, zero)
            a, b = min(np.int32(first), top), min(np.int32(second), top)
            out[block, start + j] = np.uint8(a & 15 | (b & 15) << 4)
            fifth |= np.uint32(a >> 4) << np.uint32(j) | np.uint32(b >> 4) << np.uint32(j + _HALF)
        if bits == 5:
            for byte in range(4):
                out[block, start - 4 + byte] = np.uint8(fifth >> np.uint32(8 * byte))


@njit(cache=True, nogil=True)
def _write_bytes(blocks: F32, inverse: F32, out: NDArray[np.int8]) -> None:  # pragma: no cover
    """Codes x * inverse, rounded half away from zero as roundf does, behind the scale's two bytes."""
    half = np.float32(0.5)
    for block in range(blocks.shape[0]):
        inv = inverse[block]
        if not np.isfinite(inv):  # see _write_codes
            out[block, 2:] = 0
            continue
        for j in range(BLOCK):
            value = blocks[block, j] * inv
            whole = np.int32(value)
            rest = value - np.float32(whole)
            whole += np.int32(rest >= half) - np.int32(rest <= -half)
            out[block, 2 + j] = np.int8(whole)


@njit(cache=True, nogil=True)
def _expand_codes(packed: U8, scale: F32, low: F32, zero: int, bits: int, out: F32) -> None:  # pragma: no cover
    start = packed.shape[1] - _HALF
    for block in range(packed.shape[0]):
        d, m = scale[block], low[block]
        fifth = np.uint32(0)
        if bits == 5:
            for byte in range(4):
                fifth |= np.uint32(packed[block, start - 4 + byte]) << np.uint32(8 * byte)
        for j in range(_HALF):
            both = np.int32(packed[block, start + j])
            first = both & 15 | np.int32(fifth >> np.uint32(j) & np.uint32(1)) << 4
            second = both >> 4 | np.int32(fifth >> np.uint32(j + _HALF) & np.uint32(1)) << 4
            # Without a minimum nothing is added: -0.0 + 0.0 would lose the sign.
            a, b = np.float32(first - zero) * d, np.float32(second - zero) * d
            out[block, j] = a if zero else a + m
            out[block, j + _HALF] = b if zero else b + m


@njit(cache=True, nogil=True)
def _expand_bytes(packed: NDArray[np.int8], scale: F32, out: F32) -> None:  # pragma: no cover
    for block in range(packed.shape[0]):
        for j in range(BLOCK):
            out[block, j] = np.float32(packed[block, 2 + j]) * scale[block]
