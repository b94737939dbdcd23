"""Schemes and the rule for group sizes that do not divide a row."""

from __future__ import annotations

import pytest

from converters.errors import UsageError
from converters.quantize.scheme import FP16, SCHEMES, NumberType, resolve_scheme, scheme_named


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
