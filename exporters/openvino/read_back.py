"""The matrices of an artifact, read and dequantized by OpenVINO."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import openvino as ov

from converters.errors import GateError
from converters.graph import Graph
from converters.quantize.tensor import F32
from exporters.openvino.storage import Matrix, plan_matrices


def read_matrices(path: Path, graph: Graph) -> Iterator[tuple[str, F32]]:
    """(weight name, f32[out, in]) in the order of use. `graph` says which weights share a matrix."""
    model = ov.Core().read_model(path)
    constants = {node.get_friendly_name(): node for node in model.get_ordered_ops() if isinstance(node, ov.op.Constant)}
    for matrix in plan_matrices(graph):
        if matrix.width is None:
            continue
        values, start = _read(matrix, constants, path), 0
        for name, rows in zip(matrix.weights, matrix.rows, strict=True):
            yield name, values[start : start + rows]
            start += rows


def _read(matrix: Matrix, constants: Mapping[str, ov.op.Constant], path: Path) -> F32:
    """scale * (code - zero) in float32, from the constants that the file holds, unpacked by OpenVINO."""
    expected = {part: stored.name for part, stored in matrix.constants().items()}
    missing = sorted(set(expected.values()) - constants.keys())
    if missing:
        raise GateError(
            "the model lacks constants", where=str(path), expected=", ".join(missing), found="none so named"
        )
    parts: dict[str, F32] = {part: constants[name].get_data(dtype=np.float32) for part, name in expected.items()}
    if "weight" in parts:
        return parts["weight"]
    codes = parts["codes"]
    if "zero" in parts:
        codes = codes - parts["zero"]
    return (codes * parts["scale"]).reshape(matrix.shape)
