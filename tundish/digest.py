"""The digest by which the same matrix is recognized in every container."""

from __future__ import annotations

import hashlib

import numpy as np

from converters.quantize.tensor import F32


class MatrixDigest:
    """SHA-256 of a matrix's values as little-endian float32, row by row; -0 counts as 0.

    Zeros are made positive since scale * (code - zero) and scale * code + bias give zeros of different sign.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, rows: F32) -> None:
        """Add rows, f32[n, in]."""
        self._hash.update(np.ascontiguousarray(rows + np.float32(0), "<f4").data)

    def hexdigest(self) -> str:
        """The digest of the rows so far, in hex."""
        return self._hash.hexdigest()
