"""The way back: weights of a finished artifact through onnx's own reader of external data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import external_data_helper, numpy_helper

from converters.graph import Graph
from converters.ops import Embedding, Linear
from converters.quantize.tensor import F32
from exporters.onnx import pack
from exporters.onnx.matrices import stack_name


def read_matrices(path: Path, graph: Graph) -> Iterator[tuple[str, F32]]:
    """(weight name, f32[out, in]) of every matrix, one stack at a time, as MatMulNBits dequantizes it."""
    model = onnx.load(path, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    seen: set[tuple[str, ...]] = set()
    for node in graph.nodes:
        if not isinstance(node.op, Embedding | Linear) or node.op.weights in seen:
            continue
        seen.add(node.op.weights)
        stacked = not {stack_name(node.op.weights), f"{stack_name(node.op.weights)}.scales"}.isdisjoint(tensors)
        for names in [node.op.weights] if stacked else [(name,) for name in node.op.weights]:
            width = graph.weights[names[0]].shape[1]
            yield from _rows_of(graph, names, _read_stack(tensors, stack_name(names), width, path.parent))


def _rows_of(graph: Graph, names: tuple[str, ...], stack: F32) -> Iterator[tuple[str, F32]]:
    start = 0
    for name in names:
        stop = start + graph.weights[name].shape[0]
        yield name, stack[start:stop]
        start = stop


def _read_stack(tensors: Mapping[str, onnx.TensorProto], name: str, width: int, folder: Path) -> F32:
    if name in tensors:
        return _read(tensors[name], folder).astype(np.float32, copy=False)
    codes = tensors.get(f"{name}.codes", tensors.get(f"{name}.rows"))
    assert codes is not None, f"{name} has scales but no codes"
    packed = _read(codes, folder)
    packed = packed.reshape(len(packed), -1)
    zeros = _read(tensors[f"{name}.zeros"], folder) if f"{name}.zeros" in tensors else None
    bits = packed.shape[1] * 8 // width
    return pack.dequantize(packed, _read(tensors[f"{name}.scales"], folder), zeros, width, bits)


def _read(tensor: onnx.TensorProto, folder: Path) -> NDArray[Any]:  # the element type is the tensor's
    """The tensor's values; the proto given stays without them, so that memory holds one tensor."""
    loaded = onnx.TensorProto()
    loaded.CopyFrom(tensor)
    external_data_helper.load_external_data_for_tensor(loaded, str(folder))
    return numpy_helper.to_array(loaded)
