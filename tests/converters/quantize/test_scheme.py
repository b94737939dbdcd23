"""Schemes and the rule for group sizes that do not divide a row."""

from __future__ import annotations

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.errors import UsageError
from converters.quantize.scheme import FP16, SCHEMES, NumberType, resolve_scheme, scheme_named, stored_bits


@pytest.mark.parametrize(
    ("name", "row", "resolved"),
    [
        ("int4_g32", 576, "int4_g32"),
        ("int4_g128", 1536, "int4_g128"),
        ("int4_g128", 576, "int4_g64"),
        ("int4_g128", 96, "int4_g32"),
        ("int4_asym_g128", 576, "int4_asym_g64"),
        ("int4_g64", 40, "fp16"),
        ("int8_channel", 576, "int8_channel"),
        ("int8_channel", 40, "fp16"),
        ("bf16", 7, "bf16"),
        ("q4_k", 512, "q4_k"),
        ("q2_k", 576, "q4_0"),
        ("q3_k", 576, "q4_0"),
        ("q4_k", 576, "q5_0"),
        ("q5_k", 576, "q5_1"),
        ("q6_k", 576, "q8_0"),
        ("iq4_xs", 576, "iq4_nl"),
        ("iq4_nl", 576, "iq4_nl"),
        ("q6_k", 40, "fp16"),
        ("q8_0", 40, "fp16"),
    ],
)
def test_rule(name: str, row: int, resolved: str) -> None:
    assert resolve_scheme(SCHEMES[name], row) == SCHEMES.get(resolved, FP16)


def test_blocks_have_the_sizes_of_gguf() -> None:
    for scheme in SCHEMES.values():
        if scheme.type is NumberType.GGML:
            sizes = GGML_QUANT_SIZES[GGMLQuantizationType[scheme.name.upper()]]
            assert sizes == (scheme.group_size, scheme.block_nbytes), scheme.name
        else:
            assert scheme.block_nbytes is None


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fp16", 16),
        ("int8_channel", 8 + 16 / 512),
        ("int4_g32", 4.5),
        ("int4_asym_g64", 4 + 20 / 64),
        ("q4_0", 4.5),
        ("q6_k", 6.5625),
        ("iq4_xs", 4.25),
    ],
)
def test_stored_bits(name: str, bits: float) -> None:
    assert stored_bits(SCHEMES[name], 512) == bits


def test_unknown_name_lists_the_presets() -> None:
    with pytest.raises(UsageError, match="int4_g32"):
        scheme_named("int5_g32")


def test_names_say_what_they_are() -> None:
    for name, scheme in SCHEMES.items():
        assert name == scheme.name
        if scheme.type is NumberType.GGML:
            assert f"q{scheme.bits}_" in name and scheme.is_quantized and not scheme.is_integer
        if scheme.is_integer:
            assert f"int{scheme.bits}" in name and ("asym" in name) is not scheme.symmetric
            assert name.endswith("_channel" if scheme.group_size == 0 else f"_g{scheme.group_size}")
