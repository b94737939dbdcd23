"""OpenVINO IR for openvino-genai and optimum-intel: model, tokenizer and detokenizer, ready to open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from converters.chat_template import for_trimming_reader
from converters.errors import UsageError
from converters.graph import Weight
from converters.quantize.scheme import NumberType
from converters.quantize.tensor import F32
from exporters.base import (
    Activations,
    BigFile,
    Card,
    Difference,
    Layout,
    Model,
    Place,
    Runtime,
    Semantics,
    Target,
    TargetOptions,
    TensorRow,
)
from exporters.context import context_sentence
from exporters.minja import OPENVINO_GENAI, chat_differences
from exporters.openvino import examine
from exporters.openvino.config import config_json
from exporters.openvino.differences import tokenizer_differences
from exporters.openvino.storage import plan_matrices
from exporters.options import OpenvinoDevice, OpenvinoOptions
from exporters.schemes import refuse_ggml_schemes
from exporters.transformers_files import encode_json, generation_config, tokenizer_files, with_template

XML, BIN = "openvino_model.xml", "openvino_model.bin"

NPU_GROUP_SIZE = 128

_USAGE = """\
```python
import openvino_genai  # pip install openvino-genai

print(openvino_genai.LLMPipeline(".", "CPU").generate("What is the capital of France?", max_new_tokens=100))
```"""

# What the plugins take from the IR instead of their defaults when a recipe asks for float32: no 8-bit activations, no
# 8-bit cache. The arithmetic itself is chosen by whoever compiles the model, with INFERENCE_PRECISION_HINT.
RUNTIME_OPTIONS = {
    Activations.FP32: {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"},
    Activations.FP16: {"KV_CACHE_PRECISION": "f16"},
    Activations.BF16: {"KV_CACHE_PRECISION": "bf16"},
}


class OpenvinoExporter:
    """See exporters.base.Exporter."""

    target = Target.OPENVINO
    options: type[TargetOptions] = OpenvinoOptions
    requires: tuple[str, ...] = ("openvino", "openvino_tokenizers", "transformers")
    runtime_requires: tuple[str, ...] = ("openvino", "openvino_genai", "openvino_tokenizers")
    extra = "openvino"
    card = Card("openvino", "openvino-genai", ("openvino",), _USAGE)

    def check(self, model: Model, options: TargetOptions) -> None:
        refuse_ggml_schemes(model, self.target)
        assert isinstance(options, OpenvinoOptions)
        for weight in model.graph.weights.values():
            for device in options.devices:
                _check_weight(weight, device)

    def layout(self, model: Model, options: TargetOptions) -> Layout:
        self.check(model, options)
        network = network_layout(model, options)
        files, config = tokenizer_files(model), config_json(model)
        if model.tokenizer.chat_template is not None:
            files = with_template(files, for_trimming_reader(model.tokenizer.chat_template))
        described = {"config.json": config, "generation_config.json": encode_json(generation_config(model))}
        return replace(
            network, small={**files, **_converted(tuple(files.items()), config), **described, **network.small}
        )

    def semantics(self, model: Model, options: TargetOptions) -> Semantics:
        return Semantics(f"{context_sentence(model)}.", model.context_length)

    def differences(self, model: Model, options: TargetOptions) -> tuple[Difference, ...]:
        chat = chat_differences(model.tokenizer.chat_template, OPENVINO_GENAI)
        return (*tokenizer_differences(model.tokenizer), *chat)

    def read_back(self, folder: Path, model: Model) -> Iterator[tuple[str, F32]]:
        from exporters.openvino.read_back import read_matrices

        return read_matrices(folder / XML, model.graph)

    def open(self, folder: Path, options: TargetOptions) -> Runtime:
        from exporters.openvino.runtime import OpenvinoRuntime

        return OpenvinoRuntime(folder)

    def tensors(self, folder: Path) -> Iterator[TensorRow]:
        return examine.tensors(folder)

    def devices(self) -> list[str]:
        return examine.devices()


@lru_cache(maxsize=1)
def _converted(files: tuple[tuple[str, bytes], ...], config: bytes) -> Mapping[str, bytes]:
    """The tokenizer's models, which take seconds: kept for whoever lays out one model under several schemes."""
    from exporters.openvino.tokenizer import convert_tokenizer

    return convert_tokenizer(dict(files), config)


def network_layout(model: Model, options: TargetOptions) -> Layout:
    """openvino_model.xml and the places in its .bin, without tokenizer and configuration."""
    from exporters.openvino.ir import ZeroConstants, place_constants
    from exporters.openvino.lower import build_model

    matrices = plan_matrices(model.graph)
    constants = ZeroConstants([part for matrix in matrices for part in matrix.constants().values()])
    network = build_model(model.graph, constants)
    if options.activations is not None:
        for name, value in RUNTIME_OPTIONS[options.activations].items():
            network.set_rt_info(value, ["runtime_options", name])
    ir = place_constants(network, constants)
    places: dict[str, list[Place]] = {name: [] for name in model.graph.weights}
    for matrix in matrices:
        for part in matrix.constants().values():
            offset = ir.offsets[part.name]
            for name, rows in zip(matrix.weights, matrix.rows, strict=True):
                places[name].append(Place(BIN, offset, part.row_nbytes, part.pack))
                offset += rows * part.row_nbytes
    return Layout({BIN: BigFile(ir.nbytes, ir.fixed)}, places, {XML: ir.xml})


def _check_weight(weight: Weight, device: OpenvinoDevice) -> None:
    """The NPU's compiler wants symmetric weights, 4-bit ones in groups of 128 or a scale a channel
    (openvino-genai's NPU guide); the GPU and NPU plugins have no bf16."""
    scheme = weight.scheme
    if device is OpenvinoDevice.CPU:
        return
    if scheme.type is NumberType.BFLOAT:
        raise _unsuitable(weight, device, "fp16")
    if device is not OpenvinoDevice.NPU or not scheme.is_integer:
        return
    row = weight.shape[1]
    # Where 128 does not divide the row, the smaller group that the scheme was resolved to is all there is.
    grouped = scheme.bits == 4 and (scheme.group_size == NPU_GROUP_SIZE or bool(row % NPU_GROUP_SIZE))
    if not scheme.symmetric or (scheme.group_size != 0 and not grouped):
        raise _unsuitable(weight, device, "int4_g128, int8_channel or fp16")


def _unsuitable(weight: Weight, device: OpenvinoDevice, expected: str) -> UsageError:
    return UsageError(
        f"OpenVINO's {device.upper()} plugin cannot run this scheme",
        where=f"target openvino, weight {weight.name}",
        expected=expected,
        found=weight.scheme.name,
        mend=f"Choose another scheme for {weight.role.value}, or leave {device} out of devices.",
    )


EXPORTER = OpenvinoExporter()
