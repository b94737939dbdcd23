"""Widening and dequantizing against numpy's own conversions, bit for bit."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import ml_dtypes
import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher
from numpy.typing import NDArray

from converters import quantize
from converters.quantize.kernels import dequantize_codes, widen
from converters.quantize.tensor import FloatArray


def test_every_bfloat16_is_widened_as_it_is() -> None:
    stored: NDArray[ml_dtypes.bfloat16] = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)
    values, finite = widen(stored)
    assert not finite
    np.testing.assert_array_equal(values.view(np.uint32), stored.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen(dtype: type, bad: float) -> None:
    stored: FloatArray = np.full((3, 70), 1.5, dtype)
    assert widen(stored)[1]
    stored[2, 69] = bad
    assert not widen(stored)[1]


def test_a_view_of_rows_is_widened_in_order() -> None:
    stored = np.arange(60, dtype=np.float32).reshape(6, 10).astype(ml_dtypes.bfloat16)[::2]
    np.testing.assert_array_equal(widen(stored)[0], stored.astype(np.float32))


def test_values_are_scale_times_code_minus_zero() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (5, 3, 32), dtype=np.uint8)
    scale = rng.standard_normal((5, 3)).astype(np.float16).astype(np.float32)
    zero = rng.integers(0, 16, (5, 3), dtype=np.uint8)
    expected = scale[:, :, None] * (codes.astype(np.float32) - zero[:, :, None].astype(np.float32))
    values = dequantize_codes(codes, scale, zero)
    np.testing.assert_array_equal(values, expected)
    assert not np.signbit(values[values == 0]).any(), "no -0, which containers would not agree on"


def test_kernels_call_none_of_another_file() -> None:
    """numba's cache looks for changes in a kernel's own file only."""
    modules = [import_module(found.name) for found in pkgutil.walk_packages(quantize.__path__, f"{quantize.__name__}.")]
    kernels = {kernel for module in modules for kernel in vars(module).values() if isinstance(kernel, Dispatcher)}
    assert len(kernels) > 50
    for kernel in kernels:
        function = kernel.py_func
        called = {function.__globals__.get(name) for name in function.__code__.co_names}
        elsewhere = [
            each.py_func.__qualname__ for each in called & kernels if each.py_func.__module__ != function.__module__
        ]
        assert not elsewhere, f"{function.__module__}.{function.__qualname__} calls {elsewhere}"
