"""Floats in the type a container stores them in."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from converters.errors import ModelError
from converters.quantize.tensor import U8, GgmlTensor, QuantTensor, Tensor


def pack_floats(tensor: Tensor, dtype: np.dtype[np.generic], where: str) -> U8:
    """Floats [n, in] or [n] -> u8[n * in * itemsize], little-endian. ModelError if a finite one overflows `dtype`.

    Matrices come in the type of their scheme. Norms are fp32, and some containers want them in another type.
    """
    assert not isinstance(tensor, QuantTensor | GgmlTensor)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(tensor, dtype)
    if dtype != tensor.dtype and not np.isfinite(stored).all():
        raise ModelError(
            f"a weight is outside the range of {dtype.name}",
            where=where,
            expected=f"magnitudes up to {float(ml_dtypes.finfo(dtype).max):.6g}",
            found=f"{np.abs(tensor.astype(np.float32)).max():.6g}",
            mend="Set the target's activations to fp32, or leave the target out where it has none.",
        )
    return stored.reshape(-1).view(np.uint8)
