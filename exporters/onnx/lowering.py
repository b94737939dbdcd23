"""The ONNX graph while it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from converters.graph import Graph
from exporters.onnx.data_file import ONNX_TYPES, DataFile
from exporters.onnx.matrices import Matrices
from exporters.onnx.settings import Settings

MICROSOFT = "com.microsoft"

# Values that _lower_mask makes and others read.
SEQLENS = "seqlens_k"
TOTAL_LENGTH = "total_sequence_length"

Attribute = int | float | list[int]


@dataclass(frozen=True, slots=True)
class RotaryCaches:
    """ONNX values: cos and sin [positions, dim/2]."""

    cos: str
    sin: str


@dataclass(slots=True)
class Lowering:
    """An ONNX graph while it is built. `parts` maps values of the Graph to ONNX values."""

    graph: Graph
    settings: Settings
    data: DataFile
    matrices: Matrices
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fused_adds: Mapping[str, str] = field(default_factory=dict)
    rotary: RotaryCaches | None = None

    def emit(
        self,
        op_type: str,
        inputs: tuple[str, ...],
        outputs: str | tuple[str, ...],
        domain: str = "",
        **attributes: Attribute,
    ) -> str:
        """Append a node named after its first output; returns that output."""
        outputs = (outputs,) if isinstance(outputs, str) else outputs
        node = helper.make_node(op_type, inputs, outputs, outputs[0], domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return outputs[0]

    def constant(self, name: str, values: object, dtype: type[np.generic] = np.int64) -> str:
        """A small tensor inside model.onnx."""
        self.constants.setdefault(name, numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def value(self, name: str) -> str:
        """The ONNX value of a Graph value that has one part."""
        (part,) = self.parts[name]
        return part

    def cast(self, value: str, output: str) -> str:
        """The value in the activations' type."""
        return self.emit("Cast", (value,), output, to=ONNX_TYPES[self.settings.activations])
