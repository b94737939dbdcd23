"""What a recipe may set for each container. Light on purpose: reading a recipe imports no exporter and no SDK."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from exporters.target import Target


class Activations(StrEnum):
    """The float type a runtime computes in, where the container states one."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class TargetOptions(BaseModel):
    """Options common to all containers. An exporter extends it with its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    activations: Activations | None = None  # None: what the container's users expect


class GgufOptions(TargetOptions):
    """GGUF has no options of its own. The activation type is llama.cpp's choice at run time, not the file's."""


class ExecutionProvider(StrEnum):
    """Where ONNX Runtime GenAI runs the model, under the names recipes use."""

    CPU = "cpu"
    CUDA = "cuda"
    DML = "dml"
    WEBGPU = "webgpu"


class OnnxOptions(TargetOptions):
    """`accuracy_level` is MatMulNBits' attribute: the least precise activations a kernel may compute with.

    0 leaves it to the runtime, 1 means float32, 4 means int8 (faster, less exact). None leaves the attribute out.
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
    """

    execution_provider: ExecutionProvider = ExecutionProvider.CPU
    accuracy_level: Literal[0, 1, 4] | None = None


class OpenvinoDevice(StrEnum):
    """OpenVINO's device plugins, under the names recipes use."""

    CPU = "cpu"
    GPU = "gpu"
    NPU = "npu"


class OpenvinoOptions(TargetOptions):
    """`devices` are those the artifact must suit: the exporter refuses schemes that one of them cannot run."""

    devices: tuple[OpenvinoDevice, ...] = Field(default=(OpenvinoDevice.CPU,), min_length=1)


class MlxOptions(TargetOptions):
    """MLX runs on one kind of device; its activations are the float type of the weights that stay floats."""


OPTIONS: dict[Target, type[TargetOptions]] = {
    Target.GGUF: GgufOptions,
    Target.ONNX: OnnxOptions,
    Target.OPENVINO: OpenvinoOptions,
    Target.MLX: MlxOptions,
}
