"""The products of matrices that a calibration's time goes into, and who computes them: numpy, or another device.

Quantizers and references stay functions of numpy arrays. What is heavy in them asks `products()`, which is numpy's
unless the caller chose others with `computing_by`. The choice holds for the thread that made it: verification, and the
threads of a pour, compute by numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import numpy as np

from converters.errors import UsageError
from converters.quantize.tensor import F32


class Products(Protocol):
    """Takes and gives arrays of numpy, wherever it computes. All but the last bits must be those of float32."""

    @property
    def name(self) -> str:
        """Who computes: results of others may differ in the last bits."""
        ...

    def product(self, a: F32, b: F32) -> F32:
        """a @ b, f32[m, n] of f32[m, k] and f32[k, n]."""
        ...

    def linear(self, x: F32, weights: Iterable[F32], out: F32) -> None:
        """x @ w.T for x f32[n, in] and each w f32[rows, in], side by side in out f32[n, sum of rows]."""
        ...

    def attend(self, q: F32, k: F32, v: F32, mask: F32) -> F32:
        """softmax(q k^T / sqrt(dim) + mask) v, f32[heads, rows, dim], for q of that shape, k and v f32[keys, dim] and
        mask f32[rows, keys]."""
        ...


class NumpyProducts:
    """By the BLAS and the LAPACK that numpy comes with."""

    name = "numpy"

    def product(self, a: F32, b: F32) -> F32:
        value: F32 = a @ b
        return value

    def linear(self, x: F32, weights: Iterable[F32], out: F32) -> None:
        start = 0
        for weight in weights:
            stop = start + len(weight)
            np.matmul(x, weight.T, out=out[:, start:stop])
            start = stop

    def attend(self, q: F32, k: F32, v: F32, mask: F32) -> F32:
        heads, rows, dim = q.shape
        scores = ((q * np.float32(dim**-0.5)).reshape(heads * rows, dim) @ k.T).reshape(heads, rows, len(k))
        scores += mask
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        mixed: F32 = (scores.reshape(heads * rows, len(k)) @ v).reshape(heads, rows, dim) / total
        return mixed


NUMPY = NumpyProducts()
_chosen: ContextVar[Products] = ContextVar("products", default=NUMPY)


def products() -> Products:
    """Whose products this thread computes with."""
    return _chosen.get()


@contextmanager
def computing_by(chosen: Products) -> Iterator[None]:
    """Have this thread compute with other products."""
    token = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(token)


def products_on(device: str | None) -> Products:
    """numpy's; torch's on a device that it knows, such as "cuda", "cuda:1", "mps" or "cpu".

    UsageError if torch is not installed or cannot compute there.
    """
    if device is None:
        return NUMPY
    try:
        from converters.torch_products import TorchProducts
    except ImportError as error:
        raise UsageError(
            f"device {device} needs torch",
            found=str(error),
            mend="pip install 'tundish[torch]' brings it; without --device numpy computes.",
        ) from error
    return TorchProducts.on(device)
