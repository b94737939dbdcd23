"""What is in an OpenVINO model, and which devices the runtime finds here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from exporters.base import TensorRow


def tensors(folder: Path) -> Iterator[TensorRow]:
    """A row a constant of openvino_model.xml that has more than one element."""
    import openvino as ov

    path = folder / "openvino_model.xml"
    for op in ov.Core().read_model(path).get_ordered_ops():
        if op.get_type_name() != "Constant" or op.get_output_shape(0) in ([], [1]):
            continue
        kind, shape = op.get_element_type(), tuple(op.get_output_shape(0))
        nbytes = -(-math.prod(shape) * kind.bitwidth // 8)
        yield TensorRow("openvino_model.bin", op.get_friendly_name(), kind.get_type_name(), shape, nbytes)


def devices() -> list[str]:
    """The device plugins that found hardware."""
    import openvino as ov

    core = ov.Core()
    return [f"{name} ({core.get_property(name, 'FULL_DEVICE_NAME')})" for name in core.available_devices]
