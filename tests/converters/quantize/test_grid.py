"""The grids of integer schemes, and that kernels round scales to them as arrays do."""

from __future__ import annotations

import numpy as np
import pytest

from converters.quantize import gptq_kernels, hqq
from converters.quantize.grid import IntegerGrid
from converters.quantize.scheme import SCHEMES
from converters.quantize.tensor import F32


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("int8_channel", IntegerGrid(1, 255, 128, 11)),
        ("int4_g32", IntegerGrid(0, 15, 8, 11)),
        ("int4_asym_g128", IntegerGrid(0, 15, None, 7)),
    ],
)
def test_by_hand(name: str, grid: IntegerGrid) -> None:
    assert IntegerGrid.of(SCHEMES[name]) == grid


def scales() -> F32:
    """Of all sizes, and what is hard."""
    rng = np.random.default_rng(0)
    some = np.exp2(rng.uniform(-30, 17, 4000)) * rng.choice([-1, 1], 4000)
    hard = [0, 2**-24, 2**-25, 1.5 * 2**-24, 2**-14, 65504, 65519, 65520, 1e30, 3e38, np.inf, -np.inf]
    return np.array([*some, *hard], np.float32)


def test_nearest_is_what_fp16_holds() -> None:
    given, (symmetric, asymmetric) = scales(), (IntegerGrid.of(SCHEMES[name]) for name in ("int4_g32", "int4_asym_g32"))
    with np.errstate(over="ignore"):
        half = given.astype(np.float16).astype(np.float32)
    found, normal = symmetric.nearest(given), np.abs(given) > 2**-14
    np.testing.assert_array_equal(found[normal], np.where(np.isfinite(half), half, 0)[normal])
    np.testing.assert_array_equal(found.astype(np.float16), found)
    assert (np.abs(found - given)[~normal] <= 0.75 * 2**-24).all(), "rounded twice"
    found = asymmetric.nearest(given)
    np.testing.assert_array_equal(found.astype(np.float16), found)
    for zero in range(16):
        minimum = found[np.abs(found) < 4000] * np.float32(zero)
        np.testing.assert_array_equal(minimum.astype(np.float16), minimum)
    normal &= np.abs(given) < 65000
    assert (np.abs(found - given)[normal] <= np.abs(given)[normal] * 2**-7).all()


@pytest.mark.parametrize("kernel", [gptq_kernels._on_grid, hqq._on_grid])
@pytest.mark.parametrize("name", ["int4_g32", "int4_asym_g32"])
def test_kernels_do_the_same(kernel: object, name: str) -> None:
    assert callable(kernel)
    grid, given = IntegerGrid.of(SCHEMES[name]), scales()
    np.testing.assert_array_equal([kernel(scale, grid.split) for scale in given], grid.nearest(given))
