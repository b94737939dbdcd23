"""Weights in memory instead of in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from converters.quantize.tensor import F32, FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class ArraySource:
    """A tensor that already has its numbers."""

    array: F32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[np.float32]:
        return self.array.dtype

    @property
    def location(self) -> tuple[str, int]:
        return "", 0

    def read(self, start: int, stop: int) -> FloatArray:
        return self.array[start:stop]
