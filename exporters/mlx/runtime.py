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
from mlx_lm.models.cache import make_prompt_cache

from converters.quantize.tensor import F32
from exporters.base import Answer
from exporters.mlx.products import compute_by_numpy


class MatrixReader:
    """Matrices of an artifact by module path, loaded lazily by mx.load and dequantized by mx.dequantize."""

    def __init__(self, folder: Path) -> None:
        self._arrays: dict[str, mx.array] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            arrays = mx.load(str(path))
            assert isinstance(arrays, dict)
            self._arrays |= arrays
        self._quantization = read_quantization(folder)
        # An operation has one thread, and mx.dequantize does 0.2 GB/s there.
        self._streams = [mx.new_stream(mx.default_device()) for _ in range(2)]

    def read(self, path: str) -> F32:
        """f32[out, in]; each module can be read once, its memory goes with the result."""
        weight = self._arrays.pop(f"{path}.weight")
        if f"{path}.scales" not in self._arrays:
            return np.array(weight.astype(mx.float32))
        scheme = self._quantization.get(path, self._quantization)
        # In float32, scale * code + bias is exact: at most 11 + 8 significant bits.
        scales, biases = (self._arrays.pop(f"{path}.{name}").astype(mx.float32) for name in ("scales", "biases"))
        mx.eval(weight, scales, biases)
        middle = weight.shape[0] // 2
        halves = [
            mx.dequantize(weight[rows], scales[rows], biases[rows], scheme["group_size"], scheme["bits"], stream=stream)
            for rows, stream in zip((slice(middle), slice(middle, None)), self._streams, strict=True)
        ]
        mx.eval(halves)
        return np.concatenate([np.array(half, copy=False) for half in halves])


class MlxRuntime:
    """Implements exporters.base.Runtime: the folder as mlx_lm.load opens it.

    On a CPU, products of matrices are computed as exporters.mlx.products has it. For the exact comparison, a quantized
    model's fp16 scales, biases and norms are cast to float32 there, which changes no weight and lets everything be
    computed in float32; `as_opened` and the answers have them as the artifact does.
    """

    def __init__(self, folder: Path) -> None:
        self._model, self._tokenizer = mlx_lm.load(str(folder))[:2]
        self.note = ""
        self._own = self._wide = self._model.parameters()
        if mx.default_device().type == mx.DeviceType.cpu:
            compute_by_numpy(self._model)
            self.note = "products of matrices and several tokens were computed by numpy in float32"
            if read_quantization(folder):
                self._wide = tree_map_with_path(_widen, self._own)

    def logits(self, token_ids: Sequence[int]) -> F32:
        self._model.update(self._wide)
        return self._read(token_ids)

    def continued(self, pieces: Sequence[Sequence[int]]) -> F32:
        self._model.update(self._wide)
        cache = make_prompt_cache(self._model)
        return np.concatenate([_float32(self._model(mx.array([list(piece)]), cache=cache))[0] for piece in pieces])

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[F32]:
        """As mlx-lm's BatchGenerator has it: prompts padded on the right, then rolled to the left in the cache."""
        self._model.update(self._wide)
        caches = [make_prompt_cache(self._model) for _ in sequences]
        cache = [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]
        lengths = [len(ids) - 1 for ids in sequences]
        padding = [max(lengths) - length for length in lengths]
        for layer in cache:
            layer.prepare(lengths=lengths, right_padding=padding)
        prompts = mx.array([[*ids[:-1], *[0] * short] for ids, short in zip(sequences, padding, strict=True)])
        first = _float32(self._model(prompts, cache=cache))
        for layer in cache:
            layer.finalize()
        last = _float32(self._model(mx.array([[ids[-1]] for ids in sequences]), cache=cache))
        return [np.concatenate([first[i, :length], last[i]]) for i, length in enumerate(lengths)]

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

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

    def as_opened(self, token_ids: Sequence[int]) -> F32:
        self._model.update(self._own)
        return self._read(token_ids)

    def converse(self, turns: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        self._model.update(self._own)
        cache = make_prompt_cache(self._model)
        said: list[int] = []
        answers = []
        for turn in turns:
            said += turn
            prompt = said[cache[0].offset :]
            steps = mlx_lm.stream_generate(self._model, self._tokenizer, prompt, max_tokens=count, prompt_cache=cache)
            answers.append([step.token for step in steps])
            said += answers[-1]
        return answers

    def _read(self, token_ids: Sequence[int]) -> F32:
        logits: F32 = _float32(self._model(mx.array([list(token_ids)])))[0]
        return logits

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        self._model.update(self._own)
        token_ids: list[int] = []
        stopped = False
        for step in mlx_lm.stream_generate(self._model, self._tokenizer, prompt, max_tokens=max_tokens):
            token_ids.append(step.token)
            stopped = step.finish_reason == "stop"
        return Answer(tuple(token_ids), self.decode(token_ids), stopped)


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


def _float32(logits: mx.array) -> F32:
    return np.array(logits.astype(mx.float32))
