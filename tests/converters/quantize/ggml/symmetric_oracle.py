"""Q3_K, Q6_K, IQ4_NL and IQ4_XS, numbers to try them on, and errors as ggml weighs them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

from converters.checkpoint import open_checkpoint
from converters.quantize.ggml import iq4, k_symmetric
from converters.quantize.tensor import F32, U8
from tests.converters.quantize.ggml.oracle import (
    block_values,
    ggml_dequantize,
    ggml_quantize,
    ggml_quantize_reference,
    row_nbytes,
)

# Of the values' own weighted squares: the most that rounding a block's d to fp16 can cost, which is luck.
D_ROUNDING = 2.0**-22

_random = np.random.default_rng(5)
_SHAPE = 64, 1024
CASES: dict[str, NDArray[np.floating]] = {
    "normal": _random.normal(0, 0.05, _SHAPE),
    "laplace": _random.laplace(0, 0.02, _SHAPE),
    "heavy tails": _random.standard_t(3, _SHAPE) * 0.02,
    "heavier tails": _random.standard_t(2, _SHAPE) * 0.02,
    "sparse": np.where(_random.random(_SHAPE) < 0.02, _random.normal(size=_SHAPE), 0),
    "scales of many sizes": _random.normal(size=_SHAPE) * np.repeat(10 ** _random.uniform(-4, 0, (64, 32)), 32, axis=1),
    "none above zero": -np.maximum(_random.normal(size=_SHAPE), 0),
    "none below zero": np.maximum(_random.normal(size=_SHAPE), 0),
    "a few sizes": _random.choice([-1, 1, 0.5, -0.5, 0], _SHAPE),
    "large": _random.normal(0, 10000, _SHAPE),
    "d a coarse fp16": _random.normal(0, 1e-4, _SHAPE),
    "d about the smallest fp16": _random.normal(0, 1e-6, _SHAPE),
    "below fp16": _random.normal(0, 1e-9, _SHAPE),
    "subnormal": _random.normal(0, 1e-40, _SHAPE),
    "zeros": np.zeros(_SHAPE),
}
IMPORTANCES: dict[str, F32 | None] = {
    "none": None,
    "uniform": _random.uniform(0.1, 2, 1024).astype(np.float32),
    "squares of lognormal": np.square(_random.lognormal(0, 1, 1024)).astype(np.float32),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A block type: its scheme's name and our functions.

    d_at:    the byte of a block where d is
    numbers: the largest number that d multiplies
    coarse:  of a value that extremes and constants may be off
    bounds:  how much of ggml's error may be left on weights such as models have, where it is known to be less
    """

    name: str
    quantize: Callable[[F32, F32 | None], U8]
    dequantize: Callable[[U8], F32]
    d_at: int
    numbers: int
    coarse: tuple[float, float]
    bounds: dict[str, float]

    @property
    def values(self) -> int:
        return block_values(self.name)

    @property
    def nbytes(self) -> int:
        return row_nbytes(self.name, self.values)


IMPORTANCE_NAMES = ("none", "uniform", "squares of lognormal")


def _kind(name: str, home: ModuleType, d_at: int, numbers: int, coarse: tuple[float, float], *bounds: float) -> Kind:
    quantize, dequantize = getattr(home, f"quantize_{name}"), getattr(home, f"dequantize_{name}")
    return Kind(name, quantize, dequantize, d_at, numbers, coarse, dict(zip(IMPORTANCE_NAMES, bounds, strict=True)))


Q3_K = _kind("q3_k", k_symmetric, 108, 4 * 32, (0.34, 1e-3), 0.88, 0.998, 0.98)
Q6_K = _kind("q6_k", k_symmetric, 208, 32 * 128, (0.05, 2e-2), 0.83, 0.95, 0.87)
IQ4_NL = _kind("iq4_nl", iq4, 0, 127, (0.07, 2e-2), 0.91, 0.99, 0.95)
IQ4_XS = _kind("iq4_xs", iq4, 0, 127 * 32, (0.07, 2e-2), 0.90, 0.97, 0.90)

# Matrices of the sample, in rows of so many values as its own or as 256 divides.
SAMPLE_ROWS = {
    "model.layers.15.mlp.down_proj.weight": 1536,
    "model.layers.3.mlp.gate_up_proj.weight": 768,
    "model.layers.29.self_attn.qkv_proj.weight": 256,
}


def sample_matrix(name: str) -> F32:
    from tundish.sample import cached_sample

    weight = open_checkpoint(cached_sample())[name]
    rows = weight.read(0, weight.shape[0]).astype(np.float32)
    return rows.reshape(-1, SAMPLE_ROWS[name])


def weights(kind: Kind, values: F32, importance: F32 | None) -> NDArray[np.float64]:
    """What an error of each value counts in ggml-quants.c."""
    squares = np.square(values, dtype=np.float64)
    if importance is None:
        return squares
    if kind.name == "q6_k":
        return np.broadcast_to(importance.astype(np.float64), values.shape)
    blocks = squares.reshape(len(values), -1, kind.values)
    spread = np.sqrt(2 * blocks.mean(axis=2, keepdims=True) + blocks)
    weighted: NDArray[np.float64] = importance * spread.reshape(values.shape)
    return weighted


def weighted_error(kind: Kind, blocks: U8, values: F32, importance: F32 | None) -> float:
    error = ggml_dequantize(kind.name, blocks).astype(np.float64) - values
    return float((weights(kind, values, importance) * np.square(error)).sum())


def require_no_more_error(kind: Kind, values: F32, importance: F32 | None, bound: float = 1.0) -> None:
    """Our weighted error is at most `bound` times ggml's, give or take the rounding of d."""
    ours = weighted_error(kind, kind.quantize(values, importance), values, importance)
    theirs = weighted_error(kind, ggml_quantize(kind.name, values, importance), values, importance)
    if importance is None:
        theirs = min(theirs, weighted_error(kind, ggml_quantize_reference(kind.name, values), values, importance))
    floor = D_ROUNDING * float((weights(kind, values, importance) * np.square(values, dtype=np.float64)).sum())
    assert ours <= bound * theirs + floor, f"{ours / theirs if theirs else ours:.6g}"


def random_blocks(kind: Kind, rows: int, blocks: int) -> U8:
    """u8[rows, blocks * nbytes]: any bytes, and fp16 numbers of all sizes and signs as d."""
    random = np.random.default_rng(7)
    drawn = random.integers(0, 256, (rows * blocks, kind.nbytes)).astype(np.uint8)
    finite = random.integers(0, 0x7C00, len(drawn)) | random.integers(0, 2, len(drawn)) << 15
    drawn[:, kind.d_at : kind.d_at + 2] = finite.astype("<u2")[:, None].view(np.uint8)
    return drawn.reshape(rows, blocks * kind.nbytes)


def require_pieces_make_the_same_bytes(kind: Kind, rows: int) -> None:
    """Rows quantized one by one, backwards or from a view with gaps between them give the bytes they give together."""
    width = 3 * kind.values
    values = np.random.default_rng(rows).normal(0, 0.03, (rows, width)).astype(np.float32)
    spaced = np.repeat(values, 2, axis=0)[::2]
    for importance in (None, np.linspace(0.1, 2, width, dtype=np.float32)):
        together = kind.quantize(values, importance)
        assert together.shape == (rows, 3 * kind.nbytes) and together.dtype == np.uint8
        assert np.array_equal(kind.quantize(values, importance), together)
        assert np.array_equal(kind.quantize(spaced, importance), together)
        assert np.array_equal(kind.quantize(np.ascontiguousarray(values[::-1]), importance)[::-1], together)
        for row in range(rows):
            assert np.array_equal(kind.quantize(values[row : row + 1], importance)[0], together[row])
        assert kind.dequantize(together).shape == values.shape


def require_refusal_of_too_large_values(kind: Kind, values: F32) -> None:
    for importance in (None, np.ones(values.shape[1], np.float32)):
        with pytest.raises(OverflowError, match=re.escape(f"{np.abs(values).max():.3g}")):
            kind.quantize(values, importance)
