"""How a tensor is stored. The axes are orthogonal; the presets that recipes name are rows of one table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from converters.errors import UsageError

MIN_GROUP_SIZE = 32


class NumberType(Enum):
    """What a stored number is."""

    FLOAT = "float"  # IEEE 754 binary16 or binary32, by `bits`
    BFLOAT = "bfloat"
    INT = "int"
    GGML = "ggml"  # one of llama.cpp's own block types, by the scheme's name: GGUF alone can hold it


@dataclass(frozen=True, slots=True)
class Scheme:
    """Storage of one tensor.

    `group_size` counts input-axis elements that share one scale: None for floats, 0 for one scale per output channel
    (the whole row). An integer scheme stores `value = scale * (code - zero)`, zero = 2**(bits-1) when symmetric. A GGML
    scheme stores what its block type says (converters.quantize.ggml); there `group_size` is the values in a block, and
    `block_nbytes` what they take (ggml-common.h).
    """

    name: str
    type: NumberType
    bits: int
    symmetric: bool = True
    group_size: int | None = None
    block_nbytes: int | None = None

    @property
    def is_integer(self) -> bool:
        return self.type is NumberType.INT

    @property
    def is_quantized(self) -> bool:
        """Whether a quantizer chooses the numbers; floats are only rounded."""
        return self.type in (NumberType.INT, NumberType.GGML)

    def group_size_for(self, row: int) -> int:
        """The number of input-axis elements per scale in a row of `row` elements."""
        assert self.group_size is not None
        return self.group_size or row


def _int(name: str, bits: int, group_size: int, symmetric: bool = True) -> Scheme:
    return Scheme(name, NumberType.INT, bits, symmetric, group_size)


def _ggml(name: str, bits: int, block: int, nbytes: int, symmetric: bool = True) -> Scheme:
    return Scheme(name, NumberType.GGML, bits, symmetric, block, nbytes)


FP32 = Scheme("fp32", NumberType.FLOAT, 32)
FP16 = Scheme("fp16", NumberType.FLOAT, 16)
BF16 = Scheme("bf16", NumberType.BFLOAT, 16)

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        FP32,
        FP16,
        BF16,
        _int("int8_channel", 8, 0),
        _int("int8_g32", 8, 32),
        _int("int4_g32", 4, 32),
        _int("int4_g64", 4, 64),
        _int("int4_g128", 4, 128),
        _int("int4_asym_g32", 4, 32, symmetric=False),
        _int("int4_asym_g64", 4, 64, symmetric=False),
        _int("int4_asym_g128", 4, 128, symmetric=False),
        _ggml("q4_0", 4, 32, 18),
        _ggml("q4_1", 4, 32, 20, symmetric=False),
        _ggml("q5_0", 5, 32, 22),
        _ggml("q5_1", 5, 32, 24, symmetric=False),
        _ggml("q8_0", 8, 32, 34),
        _ggml("iq4_nl", 4, 32, 18),
        _ggml("iq4_xs", 4, 256, 136),
        _ggml("q2_k", 2, 256, 84, symmetric=False),
        _ggml("q3_k", 3, 256, 110),
        _ggml("q4_k", 4, 256, 144, symmetric=False),
        _ggml("q5_k", 5, 256, 176, symmetric=False),
        _ggml("q6_k", 6, 256, 210),
    )
}


def stored_bits(scheme: Scheme, row: int) -> float:
    """Bits a weight in rows of `row`: the codes, and of each group an fp16 scale and a zero if it has one.

    What a container adds, such as wider scales or minima, is not counted.
    """
    if not scheme.is_quantized:
        return scheme.bits
    if scheme.block_nbytes is not None:
        return scheme.block_nbytes * 8 / scheme.group_size_for(row)
    return scheme.bits + (16 + (0 if scheme.symmetric else scheme.bits)) / scheme.group_size_for(row)


def scheme_named(name: str) -> Scheme:
    """The preset of that name; UsageError lists the presets."""
    if name not in SCHEMES:
        raise UsageError(f"unknown scheme {name!r}", expected="one of " + ", ".join(SCHEMES))
    return SCHEMES[name]


# What llama-quantize stores where a block's values do not divide the row: tensor_type_fallback in llama-quant.cpp.
_GGML_FALLBACKS = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
}


def resolve_scheme(scheme: Scheme, row: int) -> Scheme:
    """The scheme a row of `row` elements really gets.

    Rule: a group size that does not divide the row is halved until it does, down to 32; a row that 32 does not divide
    is stored in fp16. Schemes with one scale per channel and floats always fit, but for an int row that no container
    can group by 32: also fp16. A GGML type of 256 values a block becomes the one of 32 that llama-quantize takes.
    """
    if scheme.type is NumberType.GGML:
        if row % MIN_GROUP_SIZE:
            return FP16
        return scheme if row % scheme.group_size_for(row) == 0 else SCHEMES[_GGML_FALLBACKS[scheme.name]]
    if not scheme.is_integer:
        return scheme
    if row % MIN_GROUP_SIZE:
        return FP16
    size = scheme.group_size
    if not size or row % size == 0:
        return scheme
    while row % size:
        size //= 2
    return replace(scheme, name=scheme.name.rsplit("_g", 1)[0] + f"_g{size}", group_size=size)
