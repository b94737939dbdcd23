"""The digest by which the same matrix is recognized in every container."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import xxhash

from converters.quantize.tensor import F32

# Rows that are hashed at a time. Blocks of a matrix are then hashed in any order, on several threads.
LEAF_ROWS = 32


def leaf_digests(rows: F32) -> bytes:
    """XXH3-128 of every LEAF_ROWS rows of f32[n, in], the last leaf maybe shorter; -0 must be 0 already.

    The values are little-endian float32, row by row. XXH3 tells whether two containers hold the same numbers, and is
    faster than memory; whether a file was tampered with is for the manifest's SHA-256 to tell.
    """
    data = np.ascontiguousarray(rows, "<f4")
    return b"".join(xxhash.xxh3_128_digest(data[at : at + LEAF_ROWS].data) for at in range(0, len(data), LEAF_ROWS))


def matrix_digest(leaves: Iterable[bytes]) -> str:
    """The digest of a matrix from the digests of its leaves in order, in hex."""
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def digest_of(rows: F32) -> str:
    """The digest of a whole matrix f32[out, in].

    Zeros are made positive since scale * (code - zero) and scale * code + bias give zeros of different sign.
    """
    return matrix_digest(leaf_digests(rows[at : at + 1024] + np.float32(0)) for at in range(0, len(rows), 1024))
