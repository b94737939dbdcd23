"""What is in an ONNX model, and what ONNX Runtime can use here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from exporters.base import TensorRow
from exporters.onnx.names import MODEL_FILE


def tensors(folder: Path) -> Iterator[TensorRow]:
    """A row an initializer with the file its bytes are in; a tied matrix shows twice, as the model refers to it."""
    import onnx

    for tensor in onnx.load(folder / MODEL_FILE, load_external_data=False).graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        nbytes = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * math.prod(tensor.dims)
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        yield TensorRow(external.get("location", MODEL_FILE), tensor.name, kind, tuple(tensor.dims), nbytes)


def devices() -> list[str]:
    """ONNX Runtime's execution providers in this installation."""
    import onnxruntime

    return [str(name) for name in onnxruntime.get_available_providers()]
