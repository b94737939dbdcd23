"""From rows to the scales and codes of Q3_K, Q6_K, IQ4_NL and IQ4_XS, before they are packed into blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.quantize.ggml.symmetric_kernels import WEIGH_SQUARE, Grid, fill_blocks, fill_superblocks
from converters.quantize.half import to_fp16
from converters.quantize.tensor import F32, U8

I8 = NDArray[np.int8]
SUPERBLOCK = 256  # values


@dataclass(frozen=True, slots=True)
class Search:
    """How a block type's scales are found.

    weigh:    what an error counts where an importance is given; WEIGH_SQUARE without
    ends:     numbers of the grid that a sub-block's extreme value is mapped to
    clipping: ends outside the grid that are tried too where an importance is given: without, extreme values count most
    """

    grid: Grid
    weigh: int
    ends: F32
    clipping: F32


def search_superblocks(values: F32, importance: F32 | None, search: Search) -> tuple[U8, I8, U8]:
    """d u8[n, 2] (fp16, little-endian), scales i8[n, subs] and codes u8[n, SUPERBLOCK] of rows in superblocks.

    values f32[rows, in], importance f32[in]. OverflowError if a d does not fit fp16.
    """
    blocks, counts, weigh, ends = _prepared(values, importance, search)
    subs = SUPERBLOCK // search.grid.size
    d = np.empty(len(blocks) // subs, np.float32)
    scales = np.empty((len(d), subs), np.int8)
    codes = np.empty(blocks.shape, np.uint8)
    fill_superblocks(blocks, counts, weigh, search.grid, ends, d, scales, codes)
    return _bytes_of(d, values), scales, codes.reshape(-1, SUPERBLOCK)


def search_blocks(values: F32, importance: F32 | None, search: Search) -> tuple[U8, U8]:
    """d u8[n, 2] (fp16, little-endian) and codes u8[n, size] of rows in blocks without sub-blocks.

    values f32[rows, in], importance f32[in]. OverflowError if a d does not fit fp16.
    """
    blocks, counts, weigh, ends = _prepared(values, importance, search)
    d = np.empty(len(blocks), np.float32)
    codes = np.empty(blocks.shape, np.uint8)
    fill_blocks(blocks, counts, weigh, search.grid, ends, d, codes)
    return _bytes_of(d, values), codes


def _prepared(values: F32, importance: F32 | None, search: Search) -> tuple[F32, F32, int, F32]:
    size = search.grid.size
    assert values.dtype == np.float32 and values.shape[1] % size == 0, values.shape
    blocks = np.ascontiguousarray(values).reshape(-1, size)
    if importance is None:
        return blocks, np.ones((1, size), np.float32), WEIGH_SQUARE, search.ends
    counts = np.ascontiguousarray(importance, np.float32).reshape(-1, size)
    return blocks, counts, search.weigh, np.concatenate([search.ends, search.clipping])


def _bytes_of(d: F32, values: F32) -> U8:
    return to_fp16(d, values).view(np.uint8).reshape(-1, 2)
