"""The containers' names. A module of its own, so that the command line's help loads neither pydantic nor numpy."""

from __future__ import annotations

from enum import StrEnum


class Target(StrEnum):
    """The containers, under the names that recipes and folders use."""

    GGUF = "gguf"
    ONNX = "onnx"
    OPENVINO = "openvino"
    MLX = "mlx"
