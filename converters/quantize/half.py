"""fp16 numbers: what scales are stored as, in blocks and beside codes."""

from __future__ import annotations

import numpy as np

from converters.quantize.tensor import F16, F32, U8

_INFINITE = 65520  # and more is infinite in fp16


def to_fp16(numbers: F32, values: F32, what: str = "a scale") -> F16:
    """Little-endian fp16 of numbers; OverflowError, which tells the largest of the values, if one does not fit."""
    _require_fit(numbers, values, what)
    stored: F16 = numbers.astype("<f2")
    return stored


def scales_to_fp16(scale: F32, zero: F32 | U8 | None, values: F32) -> F16:
    """The scales of integer codes, and OverflowError as well if scale * zero, which some containers store, does not
    fit; zero: None where it is implied."""
    stored = to_fp16(scale, values)
    if zero is not None:
        _require_fit(scale * zero.astype(np.float32), values, "a scale times its zero")
    return stored


def _require_fit(numbers: F32, values: F32, what: str) -> None:
    if not np.abs(numbers).max(initial=0) < _INFINITE:
        raise OverflowError(f"values up to {np.abs(values).max():.3g} need {what} that does not fit fp16")


def fp16_at(packed: U8, start: int) -> F32:
    """The fp16 numbers at byte `start` of blocks u8[n, nbytes], as f32[n]."""
    numbers: F32 = np.ascontiguousarray(packed[:, start : start + 2]).view("<f2")[:, 0].astype(np.float32)
    return numbers
