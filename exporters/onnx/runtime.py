"""The artifact in ONNX Runtime: logits from a plain session, tokens and answers from onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og
from numpy.typing import NDArray

from converters.errors import GateError
from converters.graph import LOGITS
from converters.quantize.tensor import F32
from exporters.base import Answer
from exporters.onnx.names import ATTENTION_MASK, INPUT_IDS, MODEL_FILE, PAST, POSITION_IDS, PRESENT

CPU = "CPUExecutionProvider"
NUMPY_OF_ORT = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntime:
    """See exporters.base.Runtime.

    Everything runs on the CPU, whatever provider the artifact is for: GroupQueryAttention and MatMulNBits have CPU
    kernels for fp32 and fp16. A bf16 artifact has none, and opening its session is a GateError. One of the two runtimes
    is open at a time, so that a model is in memory once.
    """

    note = ""

    def __init__(self, folder: Path, threads: int = 2) -> None:
        self._folder = folder
        self._threads = threads
        self._session: ort.InferenceSession | None = None
        self._model: og.Model | None = None
        self._tokenizer: og.Tokenizer | None = None  # keeps its own data, not the model

    def logits(self, token_ids: Sequence[int]) -> F32:
        return self.continued([token_ids])

    def continued(self, pieces: Sequence[Sequence[int]]) -> F32:
        session = self._open_session()
        outputs = [entry.name for entry in session.get_outputs()]
        # An empty cache: [batch, kv heads, 0, head size].
        cache: dict[str, NDArray[Any]] = {
            entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), NUMPY_OF_ORT[entry.type])
            for entry in session.get_inputs()
            if entry.name not in (INPUT_IDS, ATTENTION_MASK, POSITION_IDS)
        }
        wants_positions = any(entry.name == POSITION_IDS for entry in session.get_inputs())
        found: list[F32] = []
        length = 0
        for piece in pieces:
            positions = np.arange(length, length + len(piece), dtype=np.int64)[None]
            length += len(piece)
            feeds = {INPUT_IDS: np.array([piece], np.int64), ATTENTION_MASK: np.ones((1, length), np.int64), **cache}
            feeds |= {POSITION_IDS: positions} if wants_positions else {}
            if piece is pieces[-1]:  # the cache has served
                outputs = [LOGITS]
            results = dict(zip(outputs, session.run(outputs, feeds), strict=True))
            found.append(results.pop(LOGITS)[0].astype(np.float32, copy=False))
            cache = {present.replace(PRESENT, PAST): value for present, value in results.items()}
        return np.concatenate(found) if len(found) > 1 else found[0]

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[F32]:
        model = self._open_model()
        lengths = [len(ids) - 1 for ids in sequences]
        generator = self._generator(max(lengths) + 2, len(sequences))
        padding = og.Tokenizer(model).pad_token_id
        padded = [[*ids[:-1], *[padding] * (max(lengths) + 1 - len(ids))] for ids in sequences]
        generator.append_tokens(np.array(padded, np.int32))
        first = generator.get_output(LOGITS).astype(np.float32)
        chosen = np.full((len(sequences), first.shape[-1]), -1e4, np.float32)
        chosen[np.arange(len(sequences)), [ids[-1] for ids in sequences]] = 0
        generator.set_logits(chosen)  # of a batch only what was generated can follow
        generator.generate_next_token()  # takes that
        generator.generate_next_token()  # reads it
        last = generator.get_output(LOGITS).astype(np.float32)
        return [np.concatenate([first[i, :length], last[i, -1:]]) for i, length in enumerate(lengths)]

    def as_opened(self, token_ids: Sequence[int]) -> F32:
        generator = self._generator(len(token_ids) + 1)
        generator.append_tokens(np.array([token_ids], np.int32))
        logits: F32 = generator.get_output(LOGITS)[0].astype(np.float32)
        return logits

    def converse(self, turns: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        generator = self._generator(sum(map(len, turns)) + count * len(turns) + 1)
        answers: list[list[int]] = []
        pending: list[int] = []
        for turn in turns:
            generator.append_tokens(np.array([[*pending, *turn]], np.int32))
            start = generator.token_count()
            while generator.token_count() < start + count and not generator.is_done():
                generator.generate_next_token()
            answers.append([int(token) for token in generator.get_sequence(0)[start:]])
            # genai keeps room in its cache for the last token of an answer that no stop token has ended, and never
            # reads that token: so it comes once more, with the next turn.
            pending = [] if generator.is_done() else answers[-1][-1:]
            if pending:
                generator.rewind_to(generator.token_count() - 1)
        return answers

    def tokenize(self, text: str) -> list[int]:
        return [int(token) for token in self._open_tokenizer().encode(text)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._open_tokenizer().decode(np.array(token_ids, np.int32)))

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
        generator = self._generator(len(ids) + max_tokens)
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

    def _generator(self, length: int, sequences: int = 1) -> og.Generator:
        """Greedy, for so many sequences of at most `length` tokens."""
        params = og.GeneratorParams(self._open_model())
        params.set_search_options(do_sample=False, max_length=length, batch_size=sequences)
        return og.Generator(self._open_model(), params)

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
