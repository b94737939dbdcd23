"""ONNX for ONNX Runtime GenAI: model.onnx, its weights in model.onnx.data, genai_config.json and tokenizer files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from converters.errors import UsageError
from converters.graph import Weight
from converters.ops import Attention
from converters.quantize.scheme import NumberType
from converters.quantize.tensor import F32
from exporters.base import (
    Activations,
    Card,
    Difference,
    Layout,
    Model,
    Runtime,
    Semantics,
    Target,
    TargetOptions,
    TensorRow,
)
from exporters.context import context_sentence
from exporters.minja import ORT_GENAI, chat_differences
from exporters.onnx import examine
from exporters.onnx.differences import tokenizer_differences
from exporters.onnx.genai_config import genai_config
from exporters.onnx.names import DATA_FILE, MODEL_FILE
from exporters.onnx.settings import BFLOAT_PROVIDERS, MAX_CACHE, Settings, resolve_settings
from exporters.onnx.tokenizer_files import tokenizer_files
from exporters.options import ExecutionProvider, OnnxOptions
from exporters.schemes import refuse_ggml_schemes

_USAGE = """\
```python
import json
import onnxruntime_genai as og  # pip install onnxruntime-genai

model = og.Model(".")
tokenizer, parameters = og.Tokenizer(model), og.GeneratorParams(model)
chat = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.encode(tokenizer.apply_chat_template(json.dumps(chat)))  # any text, where a model has no template
parameters.set_search_options(max_length=len(prompt) + 100)
generator = og.Generator(model, parameters)
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)[len(prompt) :]))
```"""


class OnnxExporter:
    """See exporters.base.Exporter."""

    target = Target.ONNX
    options: type[TargetOptions] = OnnxOptions
    requires: tuple[str, ...] = ("onnx",)
    runtime_requires: tuple[str, ...] = ("onnx", "onnxruntime", "onnxruntime_genai")
    extra = "onnx"
    card = Card("onnx", "ONNX Runtime GenAI", ("onnx", "onnxruntime-genai"), _USAGE)

    def check(self, model: Model, options: TargetOptions) -> None:
        refuse_ggml_schemes(model, self.target)
        settings = resolve_settings(model, options)
        for weight in model.graph.weights.values():
            _check_weight(weight, settings)
        _check_window(model, settings)
        _check_caches(model)

    def layout(self, model: Model, options: TargetOptions) -> Layout:
        from exporters.onnx.lower import lower  # needs onnx, which checking a recipe does not

        settings = resolve_settings(model, options)
        lowered, matrices = lower(model.graph, settings)
        small = {
            MODEL_FILE: lowered.SerializeToString(deterministic=True),
            "genai_config.json": genai_config(model, settings),
        }
        return Layout({DATA_FILE: matrices.data.big_file()}, matrices.places, small | tokenizer_files(model.tokenizer))

    def semantics(self, model: Model, options: TargetOptions) -> Semantics:
        return Semantics(f"{context_sentence(model)}.", model.context_length)

    def differences(self, model: Model, options: TargetOptions) -> tuple[Difference, ...]:
        chat = chat_differences(model.tokenizer.chat_template, ORT_GENAI)
        return (*tokenizer_differences(model.tokenizer), *chat)

    def read_back(self, folder: Path, model: Model) -> Iterator[tuple[str, F32]]:
        from exporters.onnx.read_back import read_matrices  # needs onnx

        return read_matrices(folder / MODEL_FILE, model.graph)

    def open(self, folder: Path, options: TargetOptions) -> Runtime:
        from exporters.onnx.runtime import OnnxRuntime  # needs onnxruntime, which exporting does not

        return OnnxRuntime(folder)

    def tensors(self, folder: Path) -> Iterator[TensorRow]:
        return examine.tensors(folder)

    def devices(self) -> list[str]:
        return examine.devices()


def _check_weight(weight: Weight, settings: Settings) -> None:
    scheme = weight.scheme
    if scheme.type is NumberType.BFLOAT and settings.provider not in BFLOAT_PROVIDERS:
        raise UsageError(
            f"ONNX Runtime's {settings.provider} provider cannot read bf16 weights",
            where=f"target onnx, weight {weight.name}",
            expected="fp16, fp32 or an integer scheme",
            found=scheme.name,
            mend=f"Choose another scheme for {weight.role.value}.",
        )
    if scheme.is_integer and settings.activations is Activations.BF16:
        raise UsageError(
            "MatMulNBits takes scales in the type of the activations, and bf16 would change the weights",
            where=f"target onnx, weight {weight.name}",
            expected="activations fp16, or a float scheme",
            found=f"activations bf16, scheme {scheme.name}",
            mend="Set the target's activations to fp16, or leave them out.",
        )
    if scheme.is_integer and not settings.block_size(scheme, weight.shape[1]):
        raise UsageError(
            "MatMulNBits needs groups of 16 or a larger power of two",
            where=f"target onnx, weight {weight.name}",
            expected="a row length divisible by 32",
            found=str(weight.shape[1]),
            mend=f"Choose a float scheme for {weight.role.value}.",
        )


def _check_window(model: Model, settings: Settings) -> None:
    """DirectML's GroupQueryAttention ignores local_window_size."""
    attentions = (node.op for node in model.graph.nodes if isinstance(node.op, Attention))
    window = min((op.window for op in attentions if op.window is not None), default=model.context_length)
    if settings.provider is ExecutionProvider.DML and window < model.context_length:
        raise UsageError(
            "DirectML's attention has no sliding window",
            where="target onnx, execution_provider dml",
            expected=f"a context of at most {window} tokens, the model's window",
            found=str(model.context_length),
            mend=f"Set context to {window} in the recipe, or build for another execution provider.",
        )


def _check_caches(model: Model) -> None:
    """The rotary caches have a row a position. A layout computes them whole, before a plan counts any memory."""
    longest = MAX_CACHE // (model.graph.config.rope.dim // 2)
    if model.context_length > longest:
        raise UsageError(
            "the context is too long for ONNX, whose rotary embedding is a table of all positions",
            where="target onnx",
            expected=f"at most {longest} tokens",
            found=str(model.context_length),
            mend=f"Set context to {longest} or less in the recipe, or leave the target onnx out.",
        )


EXPORTER = OnnxExporter()
