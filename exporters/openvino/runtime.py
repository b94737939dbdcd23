"""The artifact in OpenVINO: logits from the compiled model, tokens and answers from openvino-genai."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai

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

    Runs on the CPU, whatever devices the artifact is for. The compiled model and the pipeline each hold the weights a
    second time, packed for the processor, so one of the two is open at a time.
    """

    def __init__(self, folder: Path, threads: int = 2) -> None:
        self._folder = folder
        self._properties = dict(EXACT) | {"INFERENCE_NUM_THREADS": threads}
        self._request: ov.InferRequest | None = None
        self._pipeline: genai.LLMPipeline | None = None

    def logits(self, token_ids: Sequence[int]) -> F32:
        request = self._open_request()
        request.reset_state()
        length = len(token_ids)
        outputs = request.infer(
            {
                "input_ids": np.array([token_ids], np.int64),
                "attention_mask": np.ones((1, length), np.int64),
                "position_ids": np.arange(length, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            },
            share_outputs=True,  # of a long text and a large vocabulary the logits take gigabytes: one copy is enough
        )
        return np.array(outputs[0][0], np.float32)

    def tokenize(self, text: str) -> list[int]:
        return _ids(self._tokenizer.encode(text))

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

    def _open_request(self) -> ov.InferRequest:
        if self._request is None:
            self._pipeline = None
            model = ov.Core().compile_model(self._folder / "openvino_model.xml", "CPU", self._properties)
            self._request = model.create_infer_request()
        return self._request

    def _open_pipeline(self) -> genai.LLMPipeline:
        if self._pipeline is None:
            self._request = None
            self._pipeline = genai.LLMPipeline(self._folder, "CPU", **self._properties)
        return self._pipeline


def _ids(encoded: genai.TokenizedInputs) -> list[int]:
    return [int(token) for token in encoded.input_ids.data.reshape(-1)]
