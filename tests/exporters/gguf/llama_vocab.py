"""llama.cpp's own tokenizer as the oracle: a GGUF file without weights, opened with vocab_only."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from gguf import GGUFWriter

from converters.tokenizer import Tokenizer
from exporters.gguf.llama_api import load_library
from exporters.gguf.runtime import detokenize
from exporters.gguf.vocab import safe_general_name, tokenizer_metadata

VOCAB_ONLY = 72  # byte offset in llama_model_params of this build: seven pointers and numbers in front


class LlamaVocab:
    """The vocabulary of one GGUF file in llama.cpp."""

    def __init__(self, path: Path) -> None:
        self.lib = load_library().functions
        params = self.lib.llama_model_default_params()
        params.data[VOCAB_ONLY] = 1
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab = self.lib.llama_model_get_vocab(self.model)

    def close(self) -> None:
        self.lib.llama_model_free(self.model)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids as a prompt: special tokens are parsed, BOS and EOS added if `special` and the file says so."""
        data = text.encode()
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), ids, room, special, True)
        assert count >= 0, count
        return list(ids[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """As exporters.gguf.runtime does."""
        return detokenize(self.lib, self.vocab, ids)

    def stops(self, index: int) -> bool:
        return bool(self.lib.llama_vocab_is_eog(self.vocab, index))


def write_vocab(path: Path, tokenizer: Tokenizer, name: str = "test") -> Path:
    """A GGUF file with the tokenizer's keys alone."""
    writer = GGUFWriter(path, "llama")
    writer.add_name(safe_general_name(name, tokenizer))
    for entry in tokenizer_metadata(tokenizer):
        writer.add_key_value(entry.key, entry.value, entry.type, entry.item)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_vocab(folder: Path, tokenizer: Tokenizer, name: str = "test") -> LlamaVocab:
    return LlamaVocab(write_vocab(folder / "vocab.gguf", tokenizer, name))
