"""Packing rows into GGML blocks: pure functions on blocks of rows, never quantizing again.

Block layouts are those of ggml-common.h (block_q4_0, block_q4_1, block_q8_0): 32 values of one row a block, blocks in
row order, fp16 little-endian. Tensors of GGML schemes are blocks already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numba import njit
from numpy.typing import NDArray

from converters.quantize.scheme import NumberType, Scheme
from converters.quantize.tensor import F16, U8, GgmlTensor, QuantTensor, Tensor
from exporters.floats import pack_floats

BLOCK = 32  # values in a block of each integer type used here

# (type of number, bits, symmetric) -> how GGML stores it, for schemes that other containers know too.
COMMON_TYPES: dict[tuple[NumberType, int, bool], GGMLQuantizationType] = {
    (NumberType.FLOAT, 32, True): GGMLQuantizationType.F32,
    (NumberType.FLOAT, 16, True): GGMLQuantizationType.F16,
    (NumberType.BFLOAT, 16, True): GGMLQuantizationType.BF16,
    (NumberType.INT, 8, True): GGMLQuantizationType.Q8_0,
    (NumberType.INT, 4, True): GGMLQuantizationType.Q4_0,
    (NumberType.INT, 4, False): GGMLQuantizationType.Q4_1,
}


def ggml_type(scheme: Scheme) -> GGMLQuantizationType | None:
    """The GGML type that holds a scheme's numbers exactly; None if there is none."""
    if scheme.type is NumberType.GGML:
        return GGMLQuantizationType[scheme.name.upper()]
    return COMMON_TYPES.get((scheme.type, scheme.bits, scheme.symmetric))


def row_nbytes(kind: GGMLQuantizationType, width: int) -> int:
    """Bytes of a row of `width` values."""
    values, nbytes = GGML_QUANT_SIZES[kind]
    assert width % values == 0, (kind, width)
    return width // values * nbytes


def _quantized(tensor: Tensor) -> QuantTensor:
    assert isinstance(tensor, QuantTensor)
    return tensor.regroup(BLOCK)


def _four_bit_blocks(quant: QuantTensor, *header: F16) -> U8:
    """u8[out * in/32 * block]: fp16 numbers of each group, then byte j holds code j low and code j + 16 high."""
    rows, groups = quant.scale.shape
    numbers = np.stack(header, axis=-1).astype("<f2", copy=False).view(np.uint8)
    codes = np.ascontiguousarray(quant.codes).reshape(rows, groups, 2, BLOCK // 2)
    return _fill(numbers, codes).reshape(-1)


@njit(cache=True, nogil=True)
def _fill(header: U8, codes: U8) -> U8:  # pragma: no cover
    rows, groups, start = header.shape
    blocks = np.empty((rows, groups, start + 16), np.uint8)
    for row in range(rows):
        for group in range(groups):
            for j in range(start):
                blocks[row, group, j] = header[row, group, j]
            for j in range(16):
                blocks[row, group, start + j] = codes[row, group, 0, j] | codes[row, group, 1, j] << np.uint8(4)
    return blocks


def pack_q4_0(tensor: Tensor) -> U8:
    """Q4_0: fp16 d, 16 bytes of codes; value = d * (code - 8). u8[out * in/32 * 18]."""
    quant = _quantized(tensor)
    assert quant.bits == 4 and quant.zero is None
    return _four_bit_blocks(quant, quant.scale)


def pack_q4_1(tensor: Tensor) -> U8:
    """Q4_1: fp16 d, fp16 m, 16 bytes of codes; value = d * code + m, m = -zero * scale. u8[out * in/32 * 20]."""
    quant = _quantized(tensor)
    assert quant.bits == 4
    exact = -(quant.scale.astype(np.float32) * quant.zeros())
    minimum = exact.astype(np.float16)
    assert np.array_equal(minimum, exact), "the quantizer promises that scale * zero is exact in fp16"
    return _four_bit_blocks(quant, quant.scale, minimum)


def pack_q8_0(tensor: Tensor) -> U8:
    """Q8_0: fp16 d, 32 signed bytes; value = d * (code - 128). u8[out * in/32 * 34]."""
    quant = _quantized(tensor)
    assert quant.bits == 8 and quant.zero is None
    signed = quant.codes.reshape(*quant.scale.shape, BLOCK) ^ np.uint8(0x80)  # code - 128 in two's complement
    scale = quant.scale.astype("<f2", copy=False)[:, :, None].view(np.uint8)
    packed: U8 = np.concatenate([scale, signed], axis=2).reshape(-1)
    return packed


def pack_blocks(tensor: Tensor) -> U8:
    """Blocks as they are. u8[out * bytes of a row]."""
    assert isinstance(tensor, GgmlTensor)
    return tensor.blocks.reshape(-1)


PACKERS: dict[GGMLQuantizationType, Callable[[Tensor], U8]] = {
    GGMLQuantizationType.F32: partial(pack_floats, dtype=np.dtype("<f4"), where="target gguf"),
    GGMLQuantizationType.F16: partial(pack_floats, dtype=np.dtype("<f2"), where="target gguf"),
    GGMLQuantizationType.BF16: partial(pack_floats, dtype=np.dtype(ml_dtypes.bfloat16), where="target gguf"),
    GGMLQuantizationType.Q8_0: pack_q8_0,
    GGMLQuantizationType.Q4_0: pack_q4_0,
    GGMLQuantizationType.Q4_1: pack_q4_1,
}


def packer(scheme: Scheme) -> Callable[[Tensor], U8]:
    """What packs tensors of a scheme that GGML has a type for."""
    if scheme.type is NumberType.GGML:
        return pack_blocks
    kind = ggml_type(scheme)
    assert kind is not None, scheme.name
    return PACKERS[kind]


def interleaved_rows(rows: int, head_dim: int) -> NDArray[np.intp]:
    """Row order of q and k in the llama architecture: intp[rows], the source row of each packed row.

    Hugging Face rotates the pairs (i, i + head_dim/2) of a head, llama.cpp's llama architecture (2i, 2i + 1).
    """
    return np.arange(rows, dtype=np.intp).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def take_rows(tensor: Tensor, order: NDArray[np.intp]) -> Tensor:
    """The tensor with its rows in another order."""
    if isinstance(tensor, GgmlTensor):
        return replace(tensor, blocks=tensor.blocks[order])
    if not isinstance(tensor, QuantTensor):
        return tensor[order]
    zero = None if tensor.zero is None else tensor.zero[order]
    return replace(tensor, codes=tensor.codes[order], scale=tensor.scale[order], zero=zero)


def interleaving(pack: Callable[[Tensor], U8], head_dim: int) -> Callable[[Tensor], U8]:
    """`pack` for the q and k of the llama architecture; blocks of rows must be whole heads."""

    def pack_interleaved(tensor: Tensor) -> U8:
        return pack(take_rows(tensor, interleaved_rows(tensor.shape[0], head_dim)))

    return pack_interleaved
