"""Checkpoint folders with tokenizers of every kind that models of the llama and phi lines have, and of every flag."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer

from converters.config import ModelConfig
from tests.converters.tiny_tokenizers import (
    LLAMA3,
    O200K,
    TEKKEN,
    config,
    sentencepiece_json,
    write_byte_level,
    write_json,
)

PHI3_NAMES = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
FLAGGED = (
    AddedToken("<new>", normalized=True),
    AddedToken("<left>", lstrip=True, normalized=False),
    AddedToken("<right>", rstrip=True, normalized=False),
    AddedToken("<both>", lstrip=True, rstrip=True, normalized=False, special=True),
    AddedToken("sword", single_word=True, normalized=False),
    AddedToken("two Words", normalized=True),
)


def sentencepiece(folder: Path, metaspace: str | None = None) -> ModelConfig:
    """SentencePiece's kind by normalizers, or by Metaspace as transformers 5 saves it."""
    folder.mkdir(parents=True)
    root = json.loads(sentencepiece_json())
    if metaspace is not None:
        pre = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": metaspace, "split": False}
        root |= {"normalizer": None, "pre_tokenizer": pre}
    (folder / "tokenizer.json").write_text(json.dumps(root))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    return config(32000, (2,), bos=1)


def phi3(folder: Path, without_rstrip: tuple[str, ...] = ()) -> ModelConfig:
    """Phi-3's added tokens, which swallow what follows; more that do not, as fine-tunes add them."""
    model = sentencepiece(folder)
    root = json.loads((folder / "tokenizer.json").read_text())
    root["added_tokens"] = [token | {"rstrip": token["content"] == "</s>"} for token in root["added_tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(root))
    names = [AddedToken(text, rstrip=text != "<|endoftext|>", normalized=False, special=True) for text in PHI3_NAMES]
    more = [AddedToken(text, normalized=False, special=True) for text in without_rstrip]
    return extended(folder, model, (*names, *more))


def flagged(write: Callable[[Path], ModelConfig]) -> Callable[[Path], ModelConfig]:
    """A kind with added tokens of every flag, saved by the installed transformers."""
    return lambda folder: extended(folder, write(folder), FLAGGED)


def extended(folder: Path, model: ModelConfig, tokens: tuple[AddedToken, ...]) -> ModelConfig:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token for token in tokens if not token.special])
    tokenizer.add_tokens([token for token in tokens if token.special], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return replace(model, vocab_size=model.vocab_size + len(tokens))


KINDS: dict[str, Callable[[Path], ModelConfig]] = {
    "llama2": sentencepiece,
    "llama2 of transformers 5": lambda folder: sentencepiece(folder, "always"),
    "mistral v0.3": lambda folder: sentencepiece(folder, "first"),
    "phi3": phi3,
    "phi3 with two more": lambda folder: phi3(folder, ("<|tool|>", "<|/tool|>")),
    "llama2 with flags": flagged(sentencepiece),
    "llama2 of transformers 5 with flags": flagged(lambda folder: sentencepiece(folder, "always")),
    "gpt-2": lambda folder: write_byte_level(folder, None),
    "smollm": lambda folder: write_byte_level(folder, None, digits=True),
    "llama3": lambda folder: write_byte_level(folder, LLAMA3, ignore_merges=True),
    "qwen2": lambda folder: write_byte_level(folder, LLAMA3.replace("{1,3}", "")),
    "qwen2 with flags": flagged(lambda folder: write_byte_level(folder, LLAMA3.replace("{1,3}", ""))),
    "tekken": lambda folder: write_byte_level(folder, TEKKEN, ignore_merges=True),
    "o200k": lambda folder: write_byte_level(folder, O200K),
}
