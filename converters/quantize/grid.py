"""What an integer scheme can hold, by which codes and scales are chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from converters.quantize.scheme import Scheme
from converters.quantize.tensor import F32

_MOST = np.float32(65504)  # the largest fp16
_NORMAL = np.float32(2**-14)  # the smallest normal fp16; below it the numbers are 2**-24 apart
_SUBNORMAL = np.float32(0.75)  # float32 numbers around it are 2**-24 apart


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """Codes low ... top, and fp16 scales of so many significant bits.

    middle: the zero, where it is implied; None where each group has its own
    """

    low: int
    top: int
    middle: int | None
    significant_bits: int

    @classmethod
    def of(cls, scheme: Scheme) -> IntegerGrid:
        """That of an integer scheme."""
        assert scheme.is_integer, scheme.name
        top = (1 << scheme.bits) - 1
        if not scheme.symmetric:
            return cls(0, top, None, 7)  # scale * zero, zero < 16, then is exact in fp16, which has 11 bits
        low = 1 if scheme.bits == 8 else 0  # -128 is left out, as in Q8_0
        return cls(low, top, 1 << (scheme.bits - 1), 11)

    @property
    def split(self) -> float:
        """Times 2**n + 1, a float32 gives up all but its 24 - n leading bits (Veltkamp's split, Dekker 1971)."""
        return float(2 ** (24 - self.significant_bits) + 1)

    def nearest(self, scale: F32) -> F32:
        """The nearest scales that there are; 0 for one that is too large. A tiny one is rounded twice.

        Kernels do the same to a single scale, each in its own file: numba's cache does not notice that another changed.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            large = scale * np.float32(self.split)
            rounded = large - (large - scale)
            rounded = np.where(np.abs(rounded) < _NORMAL, (rounded + _SUBNORMAL) - _SUBNORMAL, rounded)
            found: F32 = np.where(np.abs(rounded) <= _MOST, rounded, np.float32(0))
        return found
