"""ggml's own functions for block types, by the names of their schemes, through the library that xllamacpp brings."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.quantize.tensor import F32, U8


def block_values(name: str) -> int:
    """Values in a block."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]][0]


def row_nbytes(name: str, width: int) -> int:
    """Bytes of a row of `width` values."""
    values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    assert width % values == 0, (name, width)
    return width // values * nbytes


def ggml_quantize(name: str, values: F32, importance: F32 | None) -> U8:
    """ggml_quantize_chunk, which takes an importance matrix."""
    blocks = np.empty((len(values), row_nbytes(name, values.shape[1])), np.uint8)
    function = _library().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    counts = None if importance is None else importance.ctypes.data
    kind = GGMLQuantizationType[name.upper()]
    assert function(kind, values.ctypes.data, blocks.ctypes.data, 0, *values.shape, counts) == blocks.nbytes
    return blocks


def ggml_quantize_reference(name: str, values: F32) -> U8:
    """quantize_row_*_ref."""
    blocks = np.empty((len(values), row_nbytes(name, values.shape[1])), np.uint8)
    function = getattr(_library(), f"quantize_row_{_c_name(name)}_ref")
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(values.ctypes.data, blocks.ctypes.data, values.size)
    return blocks


def ggml_dequantize(name: str, blocks: U8) -> F32:
    """dequantize_row_*."""
    values = np.empty(
        (len(blocks), blocks.shape[1] // row_nbytes(name, block_values(name)) * block_values(name)), "<f4"
    )
    function = getattr(_library(), f"dequantize_row_{_c_name(name)}")
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(blocks.ctypes.data, values.ctypes.data, values.size)
    return values


def _c_name(name: str) -> str:
    return name.replace("_k", "_K")


def _library() -> ctypes.CDLL:
    pytest.importorskip("xllamacpp")
    from exporters.gguf.llama_api import load_library

    return load_library().functions
