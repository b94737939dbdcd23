"""GGML blocks: worked by hand, against naive packing, and through ggml's own dequantizers."""

from __future__ import annotations

import ctypes
import struct

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from converters.quantize.rtn import quantize_rtn
from converters.quantize.scheme import SCHEMES, NumberType, Scheme, scheme_named
from converters.quantize.tensor import F32, U8, GgmlTensor, QuantTensor
from exporters.gguf.metadata import FILE_TYPES
from exporters.gguf.pack import (
    PACKERS,
    ggml_type,
    interleaved_rows,
    interleaving,
    pack_blocks,
    pack_q4_0,
    pack_q4_1,
    pack_q8_0,
    packer,
)
from exporters.gguf.pack import row_nbytes as nbytes_of_row

Kind = GGMLQuantizationType


def test_q4_0_block_by_hand() -> None:
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    tensor = QuantTensor(codes, np.array([[-0.5]], np.float16), None, 4)
    # -0.5 in fp16 is 0xB800; value j shares a byte with value j + 16, which here has the same code.
    assert pack_q4_0(tensor).tobytes() == bytes.fromhex("00b8 00112233445566778899aabbccddeeff")


def test_q4_1_block_by_hand() -> None:
    codes = np.concatenate([np.zeros(16, np.uint8), np.full(16, 15, np.uint8)])[None]
    tensor = QuantTensor(codes, np.array([[0.25]], np.float16), np.array([[3]], np.uint8), 4)
    # d = 0.25 is 0x3400, m = -0.75 is 0xBA00; the first half has code 0, the second 15.
    assert pack_q4_1(tensor).tobytes() == bytes.fromhex("0034 00ba") + b"\xf0" * 16


def test_q8_0_block_by_hand() -> None:
    codes = np.full((1, 32), 128, np.uint8)
    codes[0, :3] = 0, 255, 127
    tensor = QuantTensor(codes, np.array([[2.0]], np.float16), None, 8)
    assert pack_q8_0(tensor).tobytes() == bytes.fromhex("0040 807fff") + b"\0" * 29


def test_float_rows_keep_their_bytes() -> None:
    row = np.array([[1.0, -2.5]], np.float32)
    assert PACKERS[Kind.F32](row).tobytes() == struct.pack("<2f", 1.0, -2.5)
    assert PACKERS[Kind.F16](row.astype(np.float16)).tobytes() == struct.pack("<2e", 1.0, -2.5)
    assert PACKERS[Kind.BF16](row.astype(ml_dtypes.bfloat16)).tobytes() == bytes.fromhex("803f 20c0")


def naive(tensor: QuantTensor, kind: GGMLQuantizationType) -> bytes:
    """One value after the other, as the structs of ggml-common.h read."""
    out = bytearray()
    for row in range(tensor.shape[0]):
        for start in range(0, tensor.shape[1], 32):
            group = start // tensor.group_size
            codes = [int(code) for code in tensor.codes[row, start : start + 32]]
            scale = float(tensor.scale[row, group])
            out += struct.pack("<e", scale)
            if kind is Kind.Q8_0:
                out += struct.pack("<32b", *(code - 128 for code in codes))
                continue
            if kind is Kind.Q4_1:
                out += struct.pack("<e", -scale * int(tensor.zeros()[row, group]))
            out += bytes(codes[j] | codes[j + 16] << 4 for j in range(16))
    return bytes(out)


@st.composite
def quant_tensors(draw: st.DrawFn) -> tuple[QuantTensor, GGMLQuantizationType]:
    """Any tensor that a quantizer may produce, with groups of 32 ... 128 or whole rows."""
    kind = draw(st.sampled_from([Kind.Q4_0, Kind.Q4_1, Kind.Q8_0]))
    groups, size, rows = draw(st.integers(1, 3)), draw(st.sampled_from([32, 64, 96, 128])), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    bits = 8 if kind is Kind.Q8_0 else 4
    codes = random.integers(0, 1 << bits, (rows, groups * size)).astype(np.uint8)
    # Seven significant bits: the quantizer's promise for asymmetric tensors.
    significand, exponent = random.integers(-127, 128, (rows, groups)), random.integers(-14, 2, (rows, groups))
    scale = (significand * 2.0**exponent).astype(np.float16)
    zero = random.integers(0, 16, (rows, groups)).astype(np.uint8) if kind is Kind.Q4_1 else None
    return QuantTensor(codes, scale, zero, bits), kind


@given(quant_tensors())
def test_packing_equals_naive_packing(case: tuple[QuantTensor, GGMLQuantizationType]) -> None:
    tensor, kind = case
    packed = PACKERS[kind](tensor)
    assert packed.dtype == np.uint8
    assert packed.nbytes == tensor.shape[0] * nbytes_of_row(kind, tensor.shape[1])
    assert packed.tobytes() == naive(tensor, kind)


@given(quant_tensors())
def test_gguf_py_reads_the_same_numbers(case: tuple[QuantTensor, GGMLQuantizationType]) -> None:
    tensor, kind = case
    assert np.array_equal(dequantize(PACKERS[kind](tensor).reshape(tensor.shape[0], -1), kind), tensor.dequantize())


@given(quant_tensors())
def test_ggml_reads_the_same_numbers(case: tuple[QuantTensor, GGMLQuantizationType]) -> None:
    pytest.importorskip("xllamacpp")
    tensor, kind = case
    assert np.array_equal(ggml_dequantize(PACKERS[kind](tensor), kind, tensor.codes.size), tensor.dequantize().ravel())


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_0, 4), (Kind.Q8_0, 8)])
def test_ggml_packs_the_same_bytes(kind: GGMLQuantizationType, bits: int) -> None:
    """ggml's quantizer finds codes and scales of its own: unpacked into canonical form, they pack to the same bytes."""
    pytest.importorskip("xllamacpp")
    numbers = np.random.default_rng(0).normal(size=32 * 50).astype(np.float32)
    size = GGML_QUANT_SIZES[kind][1]
    blocks = ggml_quantize(numbers, kind).reshape(-1, size)
    scale = blocks[:, :2].copy().view(np.float16)
    if bits == 8:
        codes = blocks[:, 2:] ^ np.uint8(128)
    else:
        codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    assert PACKERS[kind](QuantTensor(codes, scale, None, bits)).tobytes() == blocks.tobytes()


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.is_integer])
def test_every_integer_scheme_survives_a_round_trip(name: str) -> None:
    scheme: Scheme = scheme_named(name)
    rows: F32 = np.random.default_rng(1).normal(0.02, 0.05, (6, 256)).astype(np.float32)
    tensor = quantize_rtn(rows, scheme)
    kind = ggml_type(scheme)
    assert kind is not None
    back = dequantize(PACKERS[kind](tensor).reshape(6, -1), kind)
    # Bit for bit, so that digests of the two are equal; dequantize gives no -0.0.
    assert (back + np.float32(0)).tobytes() == tensor.dequantize().tobytes()


def test_every_scheme_has_a_ggml_type_with_a_packer() -> None:
    common = [scheme for scheme in SCHEMES.values() if scheme.type is not NumberType.GGML]
    assert {ggml_type(scheme) for scheme in common} == set(PACKERS)
    for scheme in SCHEMES.values():
        kind = ggml_type(scheme)
        assert kind is not None and kind in FILE_TYPES
        if scheme.type is NumberType.GGML:
            assert kind.name.lower() == scheme.name and packer(scheme) is pack_blocks
        else:
            assert packer(scheme) is PACKERS[kind]


def test_interleaved_rows_by_hand() -> None:
    # Two heads of four rows: pairs (0, 2) and (1, 3) of a head become neighbours.
    assert interleaved_rows(8, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_interleaving_moves_scales_and_zeros_with_their_rows() -> None:
    rows = np.random.default_rng(2).normal(size=(8, 64)).astype(np.float32)
    tensor = quantize_rtn(rows, scheme_named("int4_asym_g32"))
    packed = interleaving(pack_q4_1, 4)(tensor).reshape(8, -1)
    assert np.array_equal(dequantize(packed, Kind.Q4_1), tensor.dequantize()[[0, 2, 1, 3, 4, 6, 5, 7]])


def test_interleaving_moves_blocks_with_their_rows() -> None:
    blocks = np.arange(8 * 36, dtype=np.int64).astype(np.uint8).reshape(8, 36)
    packed = interleaving(pack_blocks, 4)(GgmlTensor("q4_0", blocks, 64))
    assert np.array_equal(packed.reshape(8, 36), blocks[[0, 2, 1, 3, 4, 6, 5, 7]])


def ggml_dequantize(packed: U8, kind: GGMLQuantizationType, count: int) -> F32:
    from exporters.gguf.llama_api import load_library

    out = np.empty(count, np.float32)
    function = getattr(load_library().functions, f"dequantize_row_{kind.name.lower()}")
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    packed = np.ascontiguousarray(packed)
    function(packed.ctypes.data, out.ctypes.data, count)
    return out


def ggml_quantize(numbers: F32, kind: GGMLQuantizationType) -> U8:
    from exporters.gguf.llama_api import load_library

    values, size = GGML_QUANT_SIZES[kind]
    out = np.empty(numbers.size // values * size, np.uint8)
    function = getattr(load_library().functions, f"quantize_row_{kind.name.lower()}_ref")
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(numbers.ctypes.data, out.ctypes.data, numbers.size)
    return out
