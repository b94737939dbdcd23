"""Small tokenizers of every supported kind, as checkpoint folders: trained here, or made of mistral-common's files."""

from __future__ import annotations

import json
import shutil
from functools import cache
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from converters.config import ModelConfig, Rope, RopeKind
from converters.tokenizer import Tokenizer as Record
from converters.tokenizer import TokenType, read_tokenizer
from converters.tokenizer_json import ensure_tokenizer_json
from tundish.corpus import TOKEN_CORPUS

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}"
    rf"|\p{{N}}{{1,3}}{TAIL}"
)
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}{TAIL}"


ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)


def gate_texts(tokenizer: Record) -> list[str]:
    """The corpus, and texts with each added token at the start, in the middle and around white space."""
    texts = list(TOKEN_CORPUS)
    for text in (token.text for token in tokenizer.tokens if token.type in ADDED):
        texts += [text, f"{text}Hello{text}", f"Hello {text} world", f"{text}\nHello {text}  there{text}\n\n"]
    return texts


def config(vocab_size: int, eos: tuple[int, ...] = (), family: str = "llama", bos: int | None = None) -> ModelConfig:
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope=Rope(RopeKind.DEFAULT, 10000.0, 64),
        context_length=128,
        sliding_window=None,
        tie_embeddings=True,
        bos_token_id=bos,
        eos_token_ids=eos,
        pad_token_id=None,
    )


@cache
def byte_level_bpe(pattern: str | None, digits: bool = False, ignore_merges: bool = False, size: int = 3000) -> str:
    """tokenizer.json of a byte-level BPE trained on the corpus; GPT-2's split where no pattern is given."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TOKEN_CORPUS, trainer)
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    return str(tokenizer.to_str())


def write_byte_level(
    folder: Path, pattern: str | None, digits: bool = False, ignore_merges: bool = False, **settings: object
) -> ModelConfig:
    """A checkpoint's tokenizer files with a byte-level BPE. The vocabulary has five rows to spare."""
    folder.mkdir(parents=True, exist_ok=True)
    text = byte_level_bpe(pattern, digits, ignore_merges)
    (folder / "tokenizer.json").write_text(text)
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    write_json(folder / "tokenizer_config.json", base | settings)
    write_json(folder / "config.json", {"model_type": "llama"})
    count = Tokenizer.from_str(text).get_vocab_size()
    return config(count + 5, eos=(count - 1, count - 3))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def mistral_file(name: str) -> Path:
    """A file of the mistral-common package: tokenizer.model.v1 is Llama-2's kind of SentencePiece model."""
    return Path(str(resources.files("mistral_common") / "data" / name))


def phi3_added_tokens() -> dict[str, dict[str, object]]:
    """Phi-3's added_tokens_decoder: 32000 to 32010, and the three of SentencePiece."""
    names = {index: f"<|placeholder{index - 32001}|>" for index in range(32002, 32010)}
    names |= {32001: "<|assistant|>", 32006: "<|system|>", 32007: "<|end|>", 32010: "<|user|>"}
    rows = {0: ("<unk>", False), 1: ("<s>", False), 2: ("</s>", True), 32000: ("<|endoftext|>", False)}
    rows |= {index: (text, True) for index, text in names.items()}
    return {
        str(index): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": rstrip,
            "single_word": False,
            "special": index != 2,
        }
        for index, (text, rstrip) in sorted(rows.items())
    }


def write_sentencepiece(folder: Path, phi3: bool = False, **settings: object) -> ModelConfig:
    """A checkpoint with tokenizer.model alone: Llama-2's kind, or with Phi-3's added tokens and padded vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(mistral_file("tokenizer.model.v1"), folder / "tokenizer.model")
    base: dict[str, object] = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    if phi3:
        base |= {"added_tokens_decoder": phi3_added_tokens(), "add_bos_token": False, "eos_token": "<|endoftext|>"}
        base |= {"pad_token": "<|endoftext|>", "bos_token": "<s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", base | settings)
    write_json(folder / "config.json", {"model_type": "phi3" if phi3 else "llama"})
    return config(32064, (32007, 32001, 32000), "phi3", 1) if phi3 else config(32000, (2,), "llama", 1)


@cache
def sentencepiece_json(prepend: bool = True) -> str:
    """tokenizer.json as transformers saves it for tokenizer.model.v1: BPE with byte fallback, spaces by normalizers."""
    with TemporaryDirectory() as name:
        as_it_is: dict[str, Any] = {"tokenizer_class": "TokenizersBackend", "add_bos_token": True}
        record = read_tokenizer(Path(name), write_sentencepiece(Path(name), **as_it_is))
        backend = Tokenizer.from_str(ensure_tokenizer_json(record))
    replaced = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replaced]) if prepend else replaced
    return str(backend.to_str())
