"""The vector code against the plain sums, lane by lane."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from converters.quantize.rtn_search import LANES, try_scale, try_scale_weighted
from converters.quantize.tensor import F32


@njit(cache=False)
def plain(x: F32, inverse: F32, low: F32, high: F32, tried: F32, best: F32) -> None:
    try_scale(len(x), x, inverse, low, high, tried, best)


@njit(cache=False)
def weighted(x: F32, weight: F32, inverse: F32, low: F32, high: F32, tried: F32, best: F32) -> None:
    try_scale_weighted(len(x), x, weight, inverse, low, high, tried, best)


def naive(x: F32, weight: F32, inverse: F32, low: F32, high: F32) -> tuple[F32, F32]:
    """Gain and scale of each lane, in double precision."""
    codes = np.clip(np.rint(x * inverse), low, high).astype(np.float64)
    product = (weight[:, None] * x * codes).sum(axis=0)
    square = (weight[:, None] * codes * codes).sum(axis=0)
    scale = np.divide(product, square, out=np.zeros(LANES), where=square > 0)
    return (scale * product).astype(np.float32), scale.astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 31, 32, 257])
@pytest.mark.parametrize("with_weight", [False, True])
def test_sums_are_those_of_a_plain_loop(size: int, with_weight: bool) -> None:
    rng = np.random.default_rng(size)
    x = rng.standard_normal((size, LANES)).astype(np.float32)
    x[:, 5] = 0  # nothing to fit: scale 0
    weight = rng.uniform(0.1, 3, size).astype(np.float32) if with_weight else np.ones(size, np.float32)
    inverse = rng.uniform(-5, 5, LANES).astype(np.float32)
    low, high = -rng.integers(1, 9, LANES).astype(np.float32), rng.integers(1, 9, LANES).astype(np.float32)
    tried, best = np.arange(LANES, dtype=np.float32), np.full((3, LANES), -1, np.float32)
    if with_weight:
        weighted(x, weight, inverse, low, high, tried, best)
    else:
        plain(x, inverse, low, high, tried, best)
    gain, scale = naive(x, weight, inverse, low, high)
    np.testing.assert_allclose(best[0], gain, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(best[1], scale, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(best[2], tried)


def test_only_what_is_better_is_kept() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, LANES)).astype(np.float32)
    low, high = np.full(LANES, -8, np.float32), np.full(LANES, 7, np.float32)
    candidates = rng.uniform(1, 9, (12, LANES)).astype(np.float32)
    best = np.full((3, LANES), -1, np.float32)
    for number, inverse in enumerate(candidates):
        plain(x, inverse, low, high, np.full(LANES, number, np.float32), best)
    gains = np.stack([naive(x, np.ones(32, np.float32), inverse, low, high)[0] for inverse in candidates])
    np.testing.assert_array_equal(best[2], gains.argmax(axis=0))


def test_halves_round_to_even_and_codes_stay_in_range() -> None:
    """One element a lane: the scale is x / u, which tells the code."""
    x = np.resize(np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 90, -90], np.float32), (1, LANES))
    one = np.ones(LANES, np.float32)
    best = np.full((3, LANES), -1, np.float32)
    plain(x, one, -8 * one, 7 * one, one, best)
    codes = np.array([0, 2, 2, 0, -2, -2, 7, -8], np.float32)
    expected = np.divide(x[0, :8], codes, out=np.zeros(8, np.float32), where=codes != 0)
    np.testing.assert_array_equal(best[1, :8], expected)
