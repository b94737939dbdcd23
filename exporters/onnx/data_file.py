"""model.onnx.data: where each tensor lies. Offsets are fixed here, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx

from exporters.base import Activations, BigFile
from exporters.onnx.names import DATA_FILE

ONNX_TYPES: dict[Activations, int] = {
    Activations.FP32: onnx.TensorProto.FLOAT,
    Activations.FP16: onnx.TensorProto.FLOAT16,
    Activations.BF16: onnx.TensorProto.BFLOAT16,
}

# ONNX's external data format recommends page-aligned offsets so that a runtime can map tensors into memory; ONNX
# Runtime's own writer aligns what is worth mapping. https://onnx.ai/onnx/repo-docs/ExternalData.html
PAGE = 4096
CACHE_LINE = 64


@dataclass(slots=True)
class DataFile:
    """Hands out the bytes of the file in the order they are asked for."""

    nbytes: int = 0
    fixed: list[tuple[int, bytes]] = field(default_factory=list)

    def reserve(self, nbytes: int) -> int:
        """The offset of `nbytes` free bytes."""
        alignment = PAGE if nbytes >= PAGE else CACHE_LINE
        offset = -(-self.nbytes // alignment) * alignment
        self.nbytes = offset + nbytes
        return offset

    def store(self, values: np.ndarray) -> int:
        """The offset of an array whose values are known now."""
        data = np.ascontiguousarray(values).tobytes()
        offset = self.reserve(len(data))
        self.fixed.append((offset, data))
        return offset

    def big_file(self) -> BigFile:
        return BigFile(self.nbytes, tuple(self.fixed))


def external_tensor(name: str, onnx_type: int, shape: tuple[int, ...], offset: int, nbytes: int) -> onnx.TensorProto:
    """An initializer whose bytes are at `offset` of the data file. Several may name the same bytes."""
    tensor = onnx.TensorProto(name=name, data_type=onnx_type, dims=shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", DATA_FILE), ("offset", str(offset)), ("length", str(nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor
