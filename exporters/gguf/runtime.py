"""A GGUF file opened in llama.cpp, with exact logits for every position."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_int8, c_int32
from pathlib import Path
from typing import Any

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

NEVER_PRINTED = 1 << 0 | 1 << 3  # llama.h: LLAMA_TOKEN_ATTR_UNKNOWN, LLAMA_TOKEN_ATTR_CONTROL
BATCH = 512  # tokens a decode call: bounds the logits that llama.cpp holds at once


class LlamaCpp:
    """Implements exporters.base.Runtime. Contexts are as small as a sequence needs."""

    note = ""

    def __init__(self, path: Path) -> None:
        self._lib = load_library()
        self._c = self._lib.functions
        self._lib.log.clear()
        self._context: int | None = None
        self._kind = (0, 0, False)
        self._chat: ChatServer | None = None
        self._model = self._c.llama_model_load_from_file(os.fsencode(path), self._c.llama_model_default_params())
        if not self._model:
            raise self._failure("llama.cpp cannot load the artifact", str(path))
        self._path = path
        self._vocab = self._c.llama_model_get_vocab(self._model)
        self._vocab_size = int(self._c.llama_vocab_n_tokens(self._vocab))

    def logits(self, token_ids: Sequence[int]) -> F32:
        """f32[length, vocab] for one sequence from position 0, computed afresh."""
        return self.continued([token_ids])

    def continued(self, pieces: Sequence[Sequence[int]]) -> F32:
        """f32[length, vocab] for one sequence whose pieces are decoded one after the other."""
        self._begin(sum(map(len, pieces)))
        return self._read(pieces)

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[F32]:
        """Prompts of all sequences in one batch, then their last tokens in another; llama.cpp needs no padding."""
        self._begin(max(map(len, sequences)), len(sequences))
        found: list[list[F32]] = [[] for _ in sequences]
        for part in (slice(-1), slice(-1, None)):
            tokens = [(index, token) for index, ids in enumerate(sequences) for token in ids[part]]
            self._decode([token for _, token in tokens], every=True, sequences=[index for index, _ in tokens])
            rows = self._rows(len(tokens))
            for index in range(len(sequences)):
                found[index].append(rows[[of == index for of, _ in tokens]])
        return [np.concatenate(parts) for parts in found]

    def as_opened(self, token_ids: Sequence[int]) -> F32:
        """f32[length, vocab] with llama.cpp's own attention and cache types."""
        self._begin(len(token_ids), own=True)
        return self._read([token_ids])

    def converse(self, turns: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Greedy answers of at most `count` tokens to each turn, in one context of llama.cpp's own types."""
        self._begin(sum(map(len, turns)) + count * len(turns), own=True)
        pending: list[int] = []
        answers = []
        for turn in turns:
            answer, _ = self._generate([*pending, *turn], count)
            pending = answer[-1:]  # chosen, and not read yet
            answers.append(answer)
        return answers

    def tokenize(self, text: str) -> list[int]:
        """Ids of text as a prompt: special tokens recognized, BOS (and EOS) added where the metadata says so."""
        return self._tokenize(text, add_special=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids without special tokens, by llama_detokenize."""
        return detokenize(self._c, self._vocab, token_ids)

    def render(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]], prompt: bool
    ) -> str:
        if self._chat is None:
            self._chat = ChatServer(self._path)
        return self._chat.render(messages, tools, prompt)

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        """Greedy continuation until llama.cpp itself sees an end of generation, or max_tokens."""
        pending = self._prompt_ids(prompt)
        self._begin(len(pending) + max_tokens)
        answer, stopped = self._generate(pending, max_tokens)
        return Answer(tuple(answer), self.decode(answer), stopped)

    def _generate(self, pending: list[int], max_tokens: int) -> tuple[list[int], bool]:
        """The greedy answer to tokens that continue the context, and whether an end of generation ended it."""
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
        return answer, stopped

    def _read(self, pieces: Sequence[Sequence[int]]) -> F32:
        """f32[length, vocab] of the pieces' tokens, which continue the context."""
        out = np.empty((sum(map(len, pieces)), self._vocab_size), np.float32)
        done = 0
        for piece in pieces:
            for start in range(0, len(piece), BATCH):
                tokens = piece[start : start + BATCH]
                self._decode(tokens, every=True)
                out[done : done + len(tokens)] = self._rows(len(tokens))
                done += len(tokens)
        return out

    def _rows(self, count: int) -> F32:
        """The last decode's logits, in llama.cpp's own memory."""
        return np.ctypeslib.as_array(self._c.llama_get_logits(self._context), (count, self._vocab_size))

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

    def _begin(self, length: int, sequences: int = 1, own: bool = False) -> None:
        """An empty context for `length` tokens of each sequence; allocated anew if the present one is another.

        With its `own` types as users have it, else with what is exact.
        """
        capacity = allocated_context(length) * sequences
        self._chat = None  # the server has a context of its own
        kind = (capacity, sequences, own)
        if self._context is not None and self._kind == kind:
            self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
            return
        if self._context is not None:
            self._c.llama_free(self._context)
            self._context = None
        params = self._lib.context_params()
        params.n_ctx = capacity
        params.n_seq_max = sequences
        params.n_batch = params.n_ubatch = min(BATCH, capacity)
        if not own:
            params.flash_attn_type = FLASH_ATTENTION_OFF
            params.type_k = params.type_v = GGML_TYPE_F32
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        self._context = self._c.llama_init_from_model(self._model, params)
        if not self._context:
            raise self._failure(f"llama.cpp cannot allocate a context of {capacity} tokens", str(self._path))
        self._kind = kind

    def _decode(self, token_ids: Sequence[int], every: bool, sequences: Sequence[int] | None = None) -> None:
        """Append tokens to the context, each to its sequence of `sequences`; logits of every token or of the last."""
        count = len(token_ids)
        tokens = (c_int32 * count)(*token_ids)
        flags = (c_int8 * count)(*([1] * count if every else [0] * (count - 1) + [1]))
        batch = Batch(n_tokens=count, token=tokens, logits=flags)
        if sequences is not None:
            each = [(c_int32 * 1)(index) for index in sequences]
            batch.n_seq_id = (c_int32 * count)(*([1] * count))
            batch.seq_id = (POINTER(c_int32) * count)(*(ctypes.cast(one, POINTER(c_int32)) for one in each))
        status = self._c.llama_decode(self._context, batch)
        if status != 0:
            raise self._failure(f"llama.cpp cannot run the artifact (llama_decode returned {status})", str(self._path))

    def _failure(self, what: str, where: str) -> GateError:
        return GateError(what, where=where, found=" / ".join(list(self._lib.log)[-4:]) or "no message from llama.cpp")


def detokenize(functions: Any, vocab: int, token_ids: Sequence[int]) -> str:
    """The text of ids by llama_detokenize, which knows where a text begins.

    What prints nothing is left out before: llama.cpp leaves out the model's own space of the first token alone, even if
    that one prints nothing.
    """
    printed = [token for token in token_ids if not functions.llama_vocab_get_attr(vocab, token) & NEVER_PRINTED]
    if not printed:
        return ""
    ids = (c_int32 * len(printed))(*printed)
    size = 16 * len(printed) + 16
    text = ctypes.create_string_buffer(size)
    count = functions.llama_detokenize(vocab, ids, len(printed), text, size, False, False)
    if count < 0:
        size = -count
        text = ctypes.create_string_buffer(size)
        count = functions.llama_detokenize(vocab, ids, len(printed), text, size, False, False)
    return text.raw[:count].decode(errors="replace")
