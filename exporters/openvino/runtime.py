"""The artifact in OpenVINO: logits from the compiled model, tokens and answers from openvino-genai."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from numpy.typing import NDArray

from converters.quantize.tensor import F32
from exporters.base import Answer

# The CPU plugin's own approximations: bf16 arithmetic where the processor has it, an 8-bit cache, 8-bit activations.
EXACT: Mapping[str, str | int] = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}


class OpenvinoRuntime:
    """See exporters.base.Runtime.

    Runs on the CPU, whatever devices the artifact is for. The compiled models, exact and as users have it, and the
    pipeline, which is the users' own, each hold the weights a second time, packed for the processor, so one of them is
    open at a time.
    """

    note = ""

    def __init__(self, folder: Path, threads: int = 2) -> None:
        self._folder = folder
        self._properties: Mapping[str, str | int] = dict(EXACT) | {"INFERENCE_NUM_THREADS": threads}
        self._opened_with: Mapping[str, str | int] = {}
        self._request: ov.InferRequest | None = None
        self._pipeline: genai.LLMPipeline | None = None

    def logits(self, token_ids: Sequence[int]) -> F32:
        return self.continued([token_ids])

    def continued(self, pieces: Sequence[Sequence[int]]) -> F32:
        request = self._open_request(self._properties)
        request.reset_state()
        found: list[F32] = []
        length = 0
        for piece in pieces:
            positions = np.arange(length, length + len(piece), dtype=np.int64)[None]
            length += len(piece)
            found.append(_infer(request, np.array([piece], np.int64), np.ones((1, length), np.int64), positions)[0])
        return np.concatenate(found) if len(found) > 1 else found[0]

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[F32]:
        """Padded on the left, as optimum-intel and openvino-genai do it."""
        request = self._open_request(self._properties)
        request.reset_state()
        longest = max(map(len, sequences))
        padding = np.array([longest - len(ids) for ids in sequences])
        ids = np.array([[*[0] * short, *ids] for short, ids in zip(padding, sequences, strict=True)], np.int64)
        mask = (np.arange(longest) >= padding[:, None]).astype(np.int64)
        positions = np.maximum(np.arange(longest) - padding[:, None], 0)
        split = longest - 1
        first = _infer(request, ids[:, :split], mask[:, :split], positions[:, :split])
        last = _infer(request, ids[:, split:], mask, positions[:, split:])
        return [np.concatenate([first[i, short:], last[i]]) for i, short in enumerate(padding)]

    def as_opened(self, token_ids: Sequence[int]) -> F32:
        request = self._open_request({})
        request.reset_state()
        length = len(token_ids)
        ids, positions = np.array([token_ids], np.int64), np.arange(length, dtype=np.int64)[None]
        logits: F32 = _infer(request, ids, np.ones_like(ids), positions)[0]
        return logits

    def converse(self, turns: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """By the pipeline, whose default is continuous batching that caches what prompts begin with."""
        pipeline = self._open_pipeline()
        settings = pipeline.get_generation_config()
        settings.do_sample = False
        settings.max_new_tokens = count
        said: list[int] = []
        answers = []
        for turn in turns:
            said += turn
            ids = ov.Tensor(np.array([said], np.int64))
            result = pipeline.generate(
                genai.TokenizedInputs(ids, ov.Tensor(np.ones((1, len(said)), np.int64))), settings
            )
            answers.append([int(token) for token in result.tokens[0]])
            said += answers[-1]
        return answers

    def tokenize(self, text: str) -> list[int]:
        return _ids(self._tokenizer.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids)))

    def render(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]], prompt: bool
    ) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], prompt, tools=[dict(tool) for tool in tools] or None
            )
        )

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        # A rendered prompt has the special tokens it needs: the pipeline itself leaves them out after its template too.
        prompt_ids = self._tokenizer.encode(prompt, add_special_tokens=False)
        pipeline = self._open_pipeline()
        settings = pipeline.get_generation_config()
        settings.do_sample = False
        settings.max_new_tokens = max_tokens
        result = pipeline.generate(prompt_ids, settings)
        (token_ids,) = result.tokens
        stopped = result.finish_reasons[0] == genai.GenerationFinishReason.STOP
        return Answer(tuple(token_ids), self._tokenizer.decode(token_ids), stopped)

    @cached_property
    def _tokenizer(self) -> genai.Tokenizer:
        return genai.Tokenizer(self._folder)

    def _open_request(self, properties: Mapping[str, str | int]) -> ov.InferRequest:
        if self._request is None or self._opened_with != properties:
            self._pipeline = self._request = None
            model = ov.Core().compile_model(self._folder / "openvino_model.xml", "CPU", dict(properties))
            self._request, self._opened_with = model.create_infer_request(), properties
        return self._request

    def _open_pipeline(self) -> genai.LLMPipeline:
        if self._pipeline is None:
            self._request = None
            self._pipeline = genai.LLMPipeline(self._folder, "CPU")
        return self._pipeline


def _infer(
    request: ov.InferRequest, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]
) -> F32:
    """f32[batch, length, vocab] of tokens that follow what the request has read; `mask` covers both."""
    outputs = request.infer(
        {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "beam_idx": np.arange(len(ids), dtype=np.int32),
        },
        share_outputs=True,  # of a long text and a large vocabulary the logits take gigabytes: one copy is enough
    )
    return np.array(outputs[0], np.float32)


def _ids(encoded: genai.TokenizedInputs) -> list[int]:
    return [int(token) for token in encoded.input_ids.data.reshape(-1)]
