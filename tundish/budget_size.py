"""A budget as recipes write it: bytes of the largest artifact, as a number or as a share of what the recipe's own
schemes take, or bits a weight. Light: recipes are read with it."""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
PATTERN = r"^[0-9]+(\.[0-9]+)? ?(MB|GB|MiB|GiB|bpw|%)$"
EXPECTED = "a size such as 1.9GB, 92MB or 88MiB, bits a weight such as 4.5bpw, or a share such as 120%"


@dataclass(frozen=True, slots=True)
class BudgetSize:
    """One is set: `nbytes` of the largest artifact's folder; `share`, the same as a part of the bytes that all matrices
    take in the recipe's own schemes; `bits_per_weight` of all matrices."""

    text: str
    nbytes: int | None = None
    bits_per_weight: float | None = None
    share: float | None = None

    def __str__(self) -> str:
        return self.text


def parse_budget(text: str) -> BudgetSize:
    """`92MB` (10^6 bytes), `1.9GB` (10^9), `88MiB` (2^20), `1.8GiB` (2^30), `4.5bpw`, `120%`; or else ValueError."""
    match = re.fullmatch(PATTERN[1:-1], text)
    if match is None:
        raise ValueError(EXPECTED)
    unit = match[2]
    number = float(text.removesuffix(unit))
    if not number:
        raise ValueError(EXPECTED)
    if unit == "bpw":
        return BudgetSize(text, bits_per_weight=number)
    if unit == "%":
        return BudgetSize(text, share=number / 100)
    return BudgetSize(text, nbytes=int(number * _UNITS[unit]))
