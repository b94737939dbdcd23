"""The way back: weights of a finished artifact by onnx's own reader of external data and ONNX Runtime's own decoder.

That decoder is the operator GatherBlockQuantized, asked for all rows of a matrix. Scales are widened before, which
changes none: with fp16 scales it would round the numbers to fp16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from converters.graph import Graph
from converters.ops import Embedding, Linear
from converters.quantize.tensor import F32
from exporters.onnx.lowering import MICROSOFT
from exporters.onnx.matrices import stack_name


def read_matrices(path: Path, graph: Graph) -> Iterator[tuple[str, F32]]:
    """(weight name, f32[out, in]) of every matrix, one stack at a time."""
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
    scales = _read(tensors[f"{name}.scales"], folder).astype(np.float32)
    feeds = {"codes": packed, "ids": np.arange(len(packed)), "scales": scales}
    if f"{name}.zeros" in tensors:
        feeds["zeros"] = _read(tensors[f"{name}.zeros"], folder)
    session = decoder(packed.shape[1] * 8 // width, width // scales.shape[1], "zeros" in feeds)
    rows: F32 = session.run(None, feeds)[0]
    return rows


@cache
def decoder(bits: int, block: int, zeros: bool) -> ort.InferenceSession:
    """codes u8[n, in * bits / 8], ids i64[n], scales f32[n, in / block] and zeros, packed alike -> f32[n, in]."""
    names = {"codes": TensorProto.UINT8, "ids": TensorProto.INT64, "scales": TensorProto.FLOAT}
    names |= {"zeros": TensorProto.UINT8} if zeros else {}
    node = helper.make_node(
        "GatherBlockQuantized",
        [*names],
        ["rows"],
        domain=MICROSOFT,
        bits=bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in names.items()]
    output = helper.make_tensor_value_info("rows", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(helper.make_graph([node], "rows", inputs, [output]), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # more would wait for one another: it is memory that takes the time
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _read(tensor: onnx.TensorProto, folder: Path) -> NDArray[Any]:  # the element type is the tensor's
    """The tensor's values; the proto given stays without them, so that memory holds one tensor."""
    loaded = onnx.TensorProto()
    loaded.CopyFrom(tensor)
    external_data_helper.load_external_data_for_tensor(loaded, str(folder))
    return numpy_helper.to_array(loaded)
