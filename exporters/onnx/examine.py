"""What is in an ONNX model, and what ONNX Runtime can use here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from exporters.base import TensorRow
from exporters.onnx.names import MODEL_FILE


def tensors(folder: Path) -> Iterator[TensorRow]:
    """A row an initializer with the file its bytes are in.

    A tied matrix shows twice, as the model refers to it; the second one shares the bytes of the first.
    """
    import onnx

    owners: dict[tuple[str, ...], str] = {}
    for tensor in onnx.load(folder / MODEL_FILE, load_external_data=False).graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        nbytes = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * math.prod(tensor.dims)
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        file = external.get("location", MODEL_FILE)
        place = (file, external.get("offset", "0"), external.get("length", "")) if external else (file, tensor.name)
        owner = owners.setdefault(place, tensor.name)
        shares = None if owner == tensor.name else owner
        yield TensorRow(file, tensor.name, kind, tuple(tensor.dims), nbytes, shares)


def devices() -> list[str]:
    """ONNX Runtime's execution providers in this installation."""
    import onnxruntime

    return [str(name) for name in onnxruntime.get_available_providers()]
