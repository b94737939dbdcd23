"""The containers. Adding one is a folder here and a line in the table."""

from __future__ import annotations

from exporters.base import Exporter, Target
from exporters.gguf.exporter import EXPORTER as GGUF
from exporters.mlx.exporter import EXPORTER as MLX
from exporters.onnx.exporter import EXPORTER as ONNX
from exporters.openvino.exporter import EXPORTER as OPENVINO

EXPORTERS: dict[Target, Exporter] = {
    Target.GGUF: GGUF,
    Target.ONNX: ONNX,
    Target.OPENVINO: OPENVINO,
    Target.MLX: MLX,
}
