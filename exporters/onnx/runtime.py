"""The artifact in ONNX Runtime: logits from a plain session, tokens and answers from onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og
from numpy.typing import NDArray

from converters.errors import GateError
from converters.graph import LOGITS
from converters.quantize.tensor import F32
from exporters.base import Answer
from exporters.onnx.names import ATTENTION_MASK, INPUT_IDS, MODEL_FILE, POSITION_IDS

CPU = "CPUExecutionProvider"
NUMPY_OF_ORT = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntime:
    """See exporters.base.Runtime.

    Everything runs on the CPU, whatever provider the artifact is for: GroupQueryAttention and MatMulNBits have CPU
    kernels for fp32 and fp16. A bf16 artifact has none, and opening its session is a GateError. One of the two runtimes
    is open at a time, so that a model is in memory once.
    """

    def __init__(self, folder: Path, threads: int = 2) -> None:
        self._folder = folder
        self._threads = threads
        self._session: ort.InferenceSession | None = None
        self._model: og.Model | None = None
        self._tokenizer: og.Tokenizer | None = None  # keeps its own data, not the model

    def logits(self, token_ids: Sequence[int]) -> F32:
        session = self._open_session()
        ids = np.array([token_ids], np.int64)
        feeds: dict[str, np.ndarray] = {INPUT_IDS: ids, ATTENTION_MASK: np.ones_like(ids)}
        for entry in session.get_inputs():
            if entry.name == POSITION_IDS:
                feeds[entry.name] = np.arange(len(token_ids), dtype=np.int64)[None]
            elif entry.name not in feeds:  # an empty cache: [batch, kv heads, 0, head size]
                feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), NUMPY_OF_ORT[entry.type])
        logits: NDArray[np.floating] = session.run([LOGITS], feeds)[0]
        single: F32 = logits[0].astype(np.float32, copy=False)
        return single

    def tokenize(self, text: str) -> list[int]:
        return [int(token) for token in self._open_tokenizer().encode(text)]

    def render(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]], prompt: bool
    ) -> str:
        rendered = self._open_tokenizer().apply_chat_template(
            json.dumps(messages), tools=json.dumps(tools) if tools else None, add_generation_prompt=prompt
        )
        return str(rendered)

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        model = self._open_model()
        tokenizer = og.Tokenizer(model)
        ids = tokenizer.encode(prompt)
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(ids) + max_tokens)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        answer: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
        stopped = bool(answer) and answer[-1] in set(map(int, tokenizer.eos_token_ids))
        return Answer(tuple(answer), tokenizer.decode(np.array(answer, np.int32)), stopped)

    def _open_tokenizer(self) -> og.Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = og.Tokenizer(self._open_model())
            # Off by default, for prompts that carry their own BOS.
            self._tokenizer.update_options(add_special_tokens="true")
        return self._tokenizer

    def _open_session(self) -> ort.InferenceSession:
        if self._session is None:
            self._model = None
            options = ort.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.log_severity_level = 3
            try:
                self._session = ort.InferenceSession(str(self._folder / MODEL_FILE), options, providers=[CPU])
            except Exception as error:  # onnxruntime's exceptions share no base but Exception
                raise GateError(
                    "ONNX Runtime cannot open the model on the CPU",
                    where=str(self._folder / MODEL_FILE),
                    found=str(error),
                    mend="Verify on a machine with the execution provider it was built for.",
                ) from error
        return self._session

    def _open_model(self) -> og.Model:
        if self._model is None:
            self._session = None
            config = og.Config(str(self._folder))
            config.clear_providers()
            session = {"intra_op_num_threads": self._threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            self._model = og.Model(config)
        return self._model
