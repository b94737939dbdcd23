"""A GGUF file opened in llama.cpp, with exact logits for every position."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from ctypes import c_int8, c_int32
from functools import cached_property
from pathlib import Path

import numpy as np

from converters.errors import GateError
from converters.quantize.tensor import F32
from exporters.base import Answer
from exporters.gguf.chat import ChatServer
from exporters.gguf.context import allocated_context
from exporters.gguf.llama_api import (
    FLASH_ATTENTION_OFF,
    GGML_TYPE_F32,
    Batch,
    load_library,
)

BATCH = 512  # tokens a decode call: bounds the logits that llama.cpp holds at once


class LlamaCpp:
    """Implements exporters.base.Runtime.

    llama.cpp selects LongRoPE factors by the context it allocates. Users allocate the context that the file states, so
    contexts here are as small as a sequence needs, but on the same side of the original context as the file's own.
    """

    def __init__(self, path: Path) -> None:
        self._lib = load_library()
        self._c = self._lib.functions
        self._lib.log.clear()
        self._context: int | None = None
        self._capacity = 0
        self._model = self._c.llama_model_load_from_file(os.fsencode(path), self._c.llama_model_default_params())
        if not self._model:
            raise self._failure("llama.cpp cannot load the artifact", str(path))
        self._path = path
        self._vocab = self._c.llama_model_get_vocab(self._model)
        self._vocab_size = int(self._c.llama_vocab_n_tokens(self._vocab))
        self._smallest_context = self._find_smallest_context()

    def logits(self, token_ids: Sequence[int]) -> F32:
        """f32[length, vocab] for one sequence from position 0, computed afresh."""
        self._begin(len(token_ids))
        out = np.empty((len(token_ids), self._vocab_size), np.float32)
        for start in range(0, len(token_ids), BATCH):
            stop = min(start + BATCH, len(token_ids))
            self._decode(token_ids[start:stop], every=True)
            rows = self._c.llama_get_logits(self._context)
            out[start:stop] = np.ctypeslib.as_array(rows, (stop - start, self._vocab_size))
        return out

    def tokenize(self, text: str) -> list[int]:
        """Ids of text as a prompt: special tokens recognized, BOS (and EOS) added where the metadata says so."""
        return self._tokenize(text, add_special=True)

    def render(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]], prompt: bool
    ) -> str:
        return self._chat.render(messages, tools, prompt)

    @cached_property
    def _chat(self) -> ChatServer:
        return ChatServer(self._path)

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        """Greedy continuation until llama.cpp itself sees an end of generation, or max_tokens."""
        pending = self._prompt_ids(prompt)
        self._begin(len(pending) + max_tokens)
        answer: list[int] = []
        stopped = False
        while len(answer) < max_tokens and not stopped:
            for start in range(0, len(pending), BATCH):
                self._decode(pending[start : start + BATCH], every=False)
            last = np.ctypeslib.as_array(self._c.llama_get_logits_ith(self._context, -1), (self._vocab_size,))
            token = int(last.argmax())
            answer.append(token)
            pending = [token]
            stopped = bool(self._c.llama_vocab_is_eog(self._vocab, token))
        return Answer(tuple(answer), self._detokenize(answer), stopped)

    def _find_smallest_context(self) -> int:
        arch = self._metadata("general.architecture")
        original = self._metadata(f"{arch}.rope.scaling.original_context_length")
        if self._metadata(f"{arch}.rope.scaling.type") != "longrope" or original is None:
            return 1
        own = allocated_context(int(self._c.llama_model_n_ctx_train(self._model)))
        return int(original) + 1 if own > int(original) else 1

    def _metadata(self, key: str) -> str | None:
        value = ctypes.create_string_buffer(256)
        found = self._c.llama_model_meta_val_str(self._model, key.encode(), value, len(value))
        return None if found < 0 else value.value.decode()

    def _prompt_ids(self, prompt: str) -> list[int]:
        """The prompt's ids with one BOS if the model wants one, whether or not the chat template has written it."""
        ids = self._tokenize(prompt, add_special=False)
        bos = int(self._c.llama_vocab_bos(self._vocab))
        if self._c.llama_vocab_get_add_bos(self._vocab) and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def _tokenize(self, text: str, add_special: bool) -> list[int]:
        data = text.encode()
        size = len(data) + 2  # a token is at least a byte; BOS and EOS
        ids = (c_int32 * size)()
        count = self._c.llama_tokenize(self._vocab, data, len(data), ids, size, add_special, True)
        if count < 0:  # a normalizing vocabulary may need more, and says how many
            size = -count
            ids = (c_int32 * size)()
            count = self._c.llama_tokenize(self._vocab, data, len(data), ids, size, add_special, True)
        return list(ids[:count])

    def _detokenize(self, token_ids: Sequence[int]) -> str:
        ids = (c_int32 * len(token_ids))(*token_ids)
        size = 16 * len(token_ids) + 16
        text = ctypes.create_string_buffer(size)
        count = self._c.llama_detokenize(self._vocab, ids, len(token_ids), text, size, False, False)
        if count < 0:
            size = -count
            text = ctypes.create_string_buffer(size)
            count = self._c.llama_detokenize(self._vocab, ids, len(token_ids), text, size, False, False)
        return text.raw[:count].decode(errors="replace")

    def _begin(self, length: int) -> None:
        """An empty context for `length` tokens; allocated anew if the present one has another size."""
        capacity = allocated_context(max(length, self._smallest_context))
        if self._context is not None and self._capacity == capacity:
            self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
            return
        if self._context is not None:
            self._c.llama_free(self._context)
            self._context = None
        params = self._lib.context_params()
        params.n_ctx = capacity
        params.n_batch = params.n_ubatch = min(BATCH, capacity)
        params.flash_attn_type = FLASH_ATTENTION_OFF
        params.type_k = params.type_v = GGML_TYPE_F32
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        self._context = self._c.llama_init_from_model(self._model, params)
        if not self._context:
            raise self._failure(f"llama.cpp cannot allocate a context of {capacity} tokens", str(self._path))
        self._capacity = capacity

    def _decode(self, token_ids: Sequence[int], every: bool) -> None:
        """Append tokens to the context; logits of every token or of the last one."""
        count = len(token_ids)
        tokens = (c_int32 * count)(*token_ids)
        flags = (c_int8 * count)(*([1] * count if every else [0] * (count - 1) + [1]))
        status = self._c.llama_decode(self._context, Batch(n_tokens=count, token=tokens, logits=flags))
        if status != 0:
            raise self._failure(f"llama.cpp cannot run the artifact (llama_decode returned {status})", str(self._path))

    def _failure(self, what: str, where: str) -> GateError:
        return GateError(what, where=where, found=" / ".join(list(self._lib.log)[-4:]) or "no message from llama.cpp")
