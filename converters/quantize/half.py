"""fp16 numbers: what scales are stored as, in blocks and beside codes."""

from __future__ import annotations

import numpy as np

from converters.quantize.tensor import F16, F32, U8


def to_fp16(numbers: F32, values: F32, what: str = "a scale") -> F16:
    """Little-endian fp16 of numbers; OverflowError, which tells the largest of the values, if one does not fit."""
    with np.errstate(over="ignore"):
        stored: F16 = numbers.astype("<f2")
    if not np.isfinite(stored).all():
        raise OverflowError(f"values up to {np.abs(values).max():.3g} need {what} that does not fit fp16")
    return stored


def fp16_at(packed: U8, start: int) -> F32:
    """The fp16 numbers at byte `start` of blocks u8[n, nbytes], as f32[n]."""
    numbers: F32 = np.ascontiguousarray(packed[:, start : start + 2]).view("<f2")[:, 0].astype(np.float32)
    return numbers
