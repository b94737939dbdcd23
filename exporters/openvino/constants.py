"""Small constants of the graph."""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset15 as ops


def ints(*values: int) -> ov.Node:
    """i64[len(values)]."""
    return ops.constant(np.array(values, np.int64))


def scalar(value: float | bool, dtype: type[np.generic] = np.float32) -> ov.Node:
    """A scalar of `dtype`."""
    return ops.constant(np.array(value, dtype))
