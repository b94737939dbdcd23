"""An artifact opened by mlx and mlx-lm, its own ecosystem's readers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_map_with_path

from converters.quantize.tensor import F32
from exporters.base import Answer


class MatrixReader:
    """Matrices of an artifact by module path, loaded lazily by mx.load and dequantized by mx.dequantize."""

    def __init__(self, folder: Path) -> None:
        self._arrays: dict[str, mx.array] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            arrays = mx.load(str(path))
            assert isinstance(arrays, dict)
            self._arrays |= arrays
        self._quantization = read_quantization(folder)

    def read(self, path: str) -> F32:
        """f32[out, in]; each module can be read once, its memory goes with the result."""
        weight = self._arrays.pop(f"{path}.weight")
        if f"{path}.scales" in self._arrays:
            scheme = self._quantization.get(path, self._quantization)
            # In float32, scale * code + bias is exact: at most 11 + 8 significant bits.
            scales, biases = (self._arrays.pop(f"{path}.{name}").astype(mx.float32) for name in ("scales", "biases"))
            weight = mx.dequantize(weight, scales, biases, scheme["group_size"], scheme["bits"])
        return np.array(weight.astype(mx.float32))


class MlxRuntime:
    """Implements exporters.base.Runtime: the folder as mlx_lm.load opens it.

    On a CPU, a quantized model's fp16 scales, biases and norms are cast to float32 after loading, which changes no
    weight and lets mlx compute in float32: its CPU kernel for fp16 quantized matmul is some 50 times slower, and adds
    in fp16 where the GPU kernel that users have adds in float32.
    """

    def __init__(self, folder: Path) -> None:
        self._model, self._tokenizer = mlx_lm.load(str(folder))[:2]
        if mx.default_device().type == mx.DeviceType.cpu and read_quantization(folder):
            self._model.update(tree_map_with_path(_widen, self._model.parameters()))

    def logits(self, token_ids: Sequence[int]) -> F32:
        logits = self._model(mx.array([list(token_ids)]))
        return np.array(logits[0].astype(mx.float32))

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def render(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]], prompt: bool
    ) -> str:
        rendered = self._tokenizer.apply_chat_template(  # type: ignore[no-untyped-call]
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            add_generation_prompt=prompt,
            tokenize=False,
        )
        return str(rendered)

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        token_ids: list[int] = []
        stopped = False
        for step in mlx_lm.stream_generate(self._model, self._tokenizer, prompt, max_tokens=max_tokens):
            token_ids.append(step.token)
            stopped = step.finish_reason == "stop"
        return Answer(tuple(token_ids), self._tokenizer.decode(token_ids, skip_special_tokens=True), stopped)


def read_quantization(folder: Path) -> dict[str, Any]:
    """config.json's `quantization`; empty for a model in floats. Checked by mlx-lm, which has read the same."""
    quantization: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(
        "quantization", {}
    )
    return quantization


def _widen(path: str, parameter: mx.array) -> mx.array:
    """Scales, biases and norms in float32; matrices as they are, since mlx promotes them when it multiplies."""
    small = parameter.ndim == 1 or path.endswith((".scales", ".biases"))
    return parameter.astype(mx.float32) if small else parameter
