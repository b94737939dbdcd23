"""Rows of a checkpoint tensor in the form their scheme stores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np

from converters.errors import ModelError, NotFiniteError
from converters.graph import Graph, Weight
from converters.quantize.ggml.types import GGML_TYPES
from converters.quantize.kernels import widen
from converters.quantize.rtn import quantize_rtn
from converters.quantize.scheme import NumberType, Scheme
from converters.quantize.tensor import F32, FloatArray, GgmlTensor, QuantTensor, Tensor

_READ = 1 << 22  # numbers at a time, while a weight is looked for that is not finite

Rounding = Callable[[F32, Scheme, F32 | None], QuantTensor]
"""Values f32[out, in], an integer scheme, importance f32[in] or None -> codes."""


def quantize_rows(
    weight: Weight, start: int, stop: int, importance: F32 | None = None, rounding: Rounding = quantize_rtn
) -> Tensor:
    """Rows [start, stop) under the weight's scheme; ModelError names a tensor with NaN, Inf or too large values.

    importance: f32[in] of the weight's columns, for schemes that are quantized. rounding: for integer schemes.
    """
    values = read_rows(weight, start, stop)
    if weight.scheme.is_quantized:
        try:
            if weight.scheme.is_integer:
                return rounding(values, weight.scheme, importance)
            blocks = GGML_TYPES[weight.scheme.name].quantize(values, importance)
            return GgmlTensor(weight.scheme.name, blocks, values.shape[1])
        except OverflowError as error:
            raise too_large(weight, error) from error
    return _cast(weight, values, weight.scheme)


def too_large(weight: Weight, error: OverflowError) -> ModelError:
    """What is said of a weight that no fp16 scale reaches."""
    return ModelError(
        "weights too large for fp16 scales",
        where=_place(weight),
        found=str(error),
        mend="The checkpoint is damaged, or its weights need fp32 for this role.",
    )


def read_rows(weight: Weight, start: int, stop: int) -> F32:
    """The checkpoint's numbers f32[stop - start, ...]; ModelError if some are NaN or Inf."""
    values, finite = widen(weight.source.read(start, stop))
    if not finite:
        bad = np.argwhere(~np.isfinite(values))[0]
        at = [int(bad[0]) + start, *map(int, bad[1:])]
        raise ModelError(
            "weights contain NaN or Inf",
            where=f"{_place(weight)}, element {at}",
            expected="finite numbers",
            found=str(values[tuple(bad)]),
            mend="The checkpoint is damaged or its training diverged: download it again or use another.",
        )
    return values


@contextmanager
def blaming_weights(graph: Graph) -> Iterator[None]:
    """Where the model computes NaN or Inf in the body and a weight has some, ModelError names the weight's element."""
    try:
        yield
    except NotFiniteError:
        for weight in graph.weights.values():
            rows = weight.shape[0]
            step = max(1, _READ // math.prod(weight.shape[1:]))
            for start in range(0, rows, step):
                read_rows(weight, start, min(start + step, rows))
        raise


def _cast(weight: Weight, values: F32, scheme: Scheme) -> FloatArray:
    if scheme.bits == 32:
        return values
    brain = scheme.type is NumberType.BFLOAT
    kind = ml_dtypes.bfloat16 if brain else np.float16
    with np.errstate(over="ignore"):
        half: FloatArray = values.astype(kind)
    if not np.isfinite(half).all():
        raise ModelError(
            f"weights do not fit {scheme.name}",
            where=_place(weight),
            expected=f"magnitudes up to {float(ml_dtypes.finfo(kind).max):.6g}",
            found=f"{np.abs(values).max():.6g}",
            mend=f"Choose {'fp32' if brain else 'bf16, fp32 or an integer scheme'} for this role.",
        )
    return half


def _place(weight: Weight) -> str:
    return f"{weight.name} in {Path(weight.source.location[0]).name}"


def dequantize(tensor: Tensor) -> F32:
    """The exact float32 values of a stored tensor, -0 as 0: containers differ in the sign of their zeros."""
    if isinstance(tensor, QuantTensor):
        return tensor.dequantize()
    if isinstance(tensor, GgmlTensor):
        return GGML_TYPES[tensor.type].dequantize(tensor.blocks) + np.float32(0)
    return tensor.astype(np.float32) + np.float32(0)
