"""Packing rows into GGML blocks: pure functions on blocks of rows, never quantizing again.

Block layouts are those of ggml-common.h (block_q4_0, block_q4_1, block_q8_0): 32 values of one row a block, blocks in
row order, fp16 little-endian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from converters.quantize.scheme import NumberType, Scheme
from converters.quantize.tensor import F16, U8, QuantTensor, Tensor

BLOCK = 32  # values in a block of each integer type used here

# (type of number, bits, symmetric) -> how GGML stores it.
GGML_TYPES: dict[tuple[NumberType, int, bool], GGMLQuantizationType] = {
    (NumberType.FLOAT, 32, True): GGMLQuantizationType.F32,
    (NumberType.FLOAT, 16, True): GGMLQuantizationType.F16,
    (NumberType.BFLOAT, 16, True): GGMLQuantizationType.BF16,
    (NumberType.INT, 8, True): GGMLQuantizationType.Q8_0,
    (NumberType.INT, 4, True): GGMLQuantizationType.Q4_0,
    (NumberType.INT, 4, False): GGMLQuantizationType.Q4_1,
}


def ggml_type(scheme: Scheme) -> GGMLQuantizationType | None:
    """The GGML type that holds a scheme's numbers exactly; None if there is none."""
    return GGML_TYPES.get((scheme.type, scheme.bits, scheme.symmetric))


def row_nbytes(kind: GGMLQuantizationType, width: int) -> int:
    """Bytes of a row of `width` values."""
    values, nbytes = GGML_QUANT_SIZES[kind]
    assert width % values == 0, (kind, width)
    return width // values * nbytes


def _quantized(tensor: Tensor) -> QuantTensor:
    assert isinstance(tensor, QuantTensor)
    return tensor.regroup(BLOCK)


def _fp16_bytes(scale: F16) -> U8:
    """u8[out, groups, 2]"""
    return scale.astype("<f2")[:, :, None].view(np.uint8)


def _nibbles(codes: U8) -> U8:
    """u8[out, in] of 0 ... 15 -> u8[out, in/32, 16]: byte j of a block holds value j low and value j + 16 high."""
    halves = codes.reshape(codes.shape[0], -1, 2, BLOCK // 2)
    return halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)


def pack_q4_0(tensor: Tensor) -> U8:
    """Q4_0: fp16 d, 16 bytes of codes; value = d * (code - 8). u8[out * in/32 * 18]."""
    quant = _quantized(tensor)
    assert quant.bits == 4 and quant.zero is None
    return np.concatenate([_fp16_bytes(quant.scale), _nibbles(quant.codes)], axis=2).reshape(-1)


def pack_q4_1(tensor: Tensor) -> U8:
    """Q4_1: fp16 d, fp16 m, 16 bytes of codes; value = d * code + m, m = -zero * scale. u8[out * in/32 * 20]."""
    quant = _quantized(tensor)
    assert quant.bits == 4
    exact = -(quant.scale.astype(np.float32) * quant.zeros())
    minimum = exact.astype(np.float16)
    assert np.array_equal(minimum, exact), "the quantizer promises that scale * zero is exact in fp16"
    parts = [_fp16_bytes(quant.scale), _fp16_bytes(minimum), _nibbles(quant.codes)]
    return np.concatenate(parts, axis=2).reshape(-1)


def pack_q8_0(tensor: Tensor) -> U8:
    """Q8_0: fp16 d, 32 signed bytes; value = d * (code - 128). u8[out * in/32 * 34]."""
    quant = _quantized(tensor)
    assert quant.bits == 8 and quant.zero is None
    signed: U8 = quant.codes ^ np.uint8(0x80)  # code - 128 in two's complement
    packed: U8 = np.concatenate([_fp16_bytes(quant.scale), signed.reshape(signed.shape[0], -1, BLOCK)], axis=2)
    return packed.reshape(-1)


def _pack_float(dtype: str | np.dtype[np.generic]) -> Callable[[Tensor], U8]:
    def pack(tensor: Tensor) -> U8:
        assert not isinstance(tensor, QuantTensor)
        packed: U8 = np.ascontiguousarray(tensor, dtype).reshape(-1).view(np.uint8)
        return packed

    return pack


PACKERS: dict[GGMLQuantizationType, Callable[[Tensor], U8]] = {
    GGMLQuantizationType.F32: _pack_float("<f4"),
    GGMLQuantizationType.F16: _pack_float("<f2"),
    GGMLQuantizationType.BF16: _pack_float(np.dtype(ml_dtypes.bfloat16)),
    GGMLQuantizationType.Q8_0: pack_q8_0,
    GGMLQuantizationType.Q4_0: pack_q4_0,
    GGMLQuantizationType.Q4_1: pack_q4_1,
}


def interleaved_rows(rows: int, head_dim: int) -> NDArray[np.intp]:
    """Row order of q and k in the llama architecture: intp[rows], the source row of each packed row.

    Hugging Face rotates the pairs (i, i + head_dim/2) of a head, llama.cpp's llama architecture (2i, 2i + 1).
    """
    return np.arange(rows, dtype=np.intp).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def take_rows(tensor: Tensor, order: NDArray[np.intp]) -> Tensor:
    """The tensor with its rows in another order."""
    if not isinstance(tensor, QuantTensor):
        return tensor[order]
    zero = None if tensor.zero is None else tensor.zero[order]
    return replace(tensor, codes=tensor.codes[order], scale=tensor.scale[order], zero=zero)


def interleaving(pack: Callable[[Tensor], U8], head_dim: int) -> Callable[[Tensor], U8]:
    """`pack` for the q and k of the llama architecture; blocks of rows must be whole heads."""

    def pack_interleaved(tensor: Tensor) -> U8:
        return pack(take_rows(tensor, interleaved_rows(tensor.shape[0], head_dim)))

    return pack_interleaved
