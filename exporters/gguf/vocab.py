"""GGUF's tokenizer keys, and what llama.cpp makes of them.

Facts are those of llama.cpp's src/llama-vocab.cpp (load(), as of commit 00ad355e of ggml-org/llama.cpp, 2026) and hold
in the runtime that the tests open.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from gguf import GGUFValueType
from gguf import TokenType as GgufTokenType

from converters.chat_template import for_trimming_reader
from converters.errors import ModelError
from converters.tokenizer import SpacePrefix, Tokenizer, TokenizerKind, TokenType
from exporters.gguf.entry import Entry, array, boolean, string, u32
from exporters.gguf.pretokenizer import identify_pre

TOKEN_TYPES = {
    TokenType.NORMAL: GgufTokenType.NORMAL,
    TokenType.UNKNOWN: GgufTokenType.UNKNOWN,
    TokenType.CONTROL: GgufTokenType.CONTROL,
    TokenType.USER_DEFINED: GgufTokenType.USER_DEFINED,
    TokenType.UNUSED: GgufTokenType.UNUSED,
    TokenType.BYTE: GgufTokenType.BYTE,
}
# Tokens that end generation because of their text, in every version since February 2025. Newer ones know more; an id
# that the file states stops in all of them.
EOG_TEXTS = frozenset(("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>"))
# Texts that make a token a control token whatever its type in the file, beyond EOG_TEXTS.
CONTROL_TEXTS = EOG_TEXTS | {
    "</s>", "<eos>", "<turn|>", "<|tool_response>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "_<EOT>",
    "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "[e~[", "<|fim_prefix|>",
    "<fim-prefix>", "<fim_prefix>", "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>", "<|fim_suffix|>",
    "<fim-suffix>", "<fim_suffix>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>",
    "<fim-middle>", "<fim_middle>", "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>", "<|fim_pad|>", "<fim-pad>",
    "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>",
    "<|file_sep|>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>",
}  # fmt: skip
# A stop token that llama.cpp takes off its list again if the vocabulary has all of some other texts (gpt-oss,
# solar-open, gemma4), even if the file states its id.
UNMADE_STOPS = (
    ("<|end|>", {"<|return|>", "<|call|>"}),
    ("<|end|>", {"<|return|>", "<|calls|>"}),
    ("<|end|>", {"<|flush|>", "<|call|>"}),
    ("<|end|>", {"<|flush|>", "<|calls|>"}),
    ("</s>", {"<|tool_response>"}),
)
ID_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# The tokens that llama.cpp leaves without rstrip when general.name contains phi-3 or phi3; all of them and </s> have
# to exist then. There is no other way to state rstrip, and none at all for lstrip.
PHI3_KEPT = frozenset(("<unk>", "<s>", "<|endoftext|>"))
PHI3_REQUIRED = PHI3_KEPT | {"</s>"}
PHI3_NAME = re.compile(r"phi-?3", re.IGNORECASE)
ADDED = frozenset((TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN))


def tokenizer_metadata(tokenizer: Tokenizer) -> list[Entry]:
    """All tokenizer.* keys. Raises ModelError for a tokenizer that llama.cpp cannot run."""
    return [Entry(f"tokenizer.{e.key}", e.value, e.type, e.item) for e in _entries(tokenizer)]


def _entries(tokenizer: Tokenizer) -> Iterator[Entry]:
    sentencepiece = tokenizer.kind is TokenizerKind.SENTENCEPIECE
    yield string("ggml.model", "llama" if sentencepiece else "gpt2")
    yield string("ggml.pre", "default" if sentencepiece else identify_pre(tokenizer).name)
    yield array("ggml.tokens", [token.text for token in tokenizer.tokens], GGUFValueType.STRING)
    if sentencepiece:
        yield array("ggml.scores", [token.score for token in tokenizer.tokens], GGUFValueType.FLOAT32)
    types = [int(TOKEN_TYPES[token.type]) for token in tokenizer.tokens]
    yield array("ggml.token_type", types, GGUFValueType.INT32)
    if not sentencepiece:
        yield array("ggml.merges", [f"{left} {right}" for left, right in tokenizer.merges], GGUFValueType.STRING)
    yield from _special_ids(tokenizer)
    yield boolean("ggml.add_bos_token", tokenizer.add_bos)
    yield boolean("ggml.add_eos_token", tokenizer.add_eos)
    yield boolean("ggml.add_space_prefix", _add_space_prefix(tokenizer))
    if tokenizer.chat_template is not None:
        yield string("chat_template", for_trimming_reader(tokenizer.chat_template))


def _special_ids(tokenizer: Tokenizer) -> Iterator[Entry]:
    for key, index in (
        ("bos_token_id", tokenizer.bos_id),
        ("unknown_token_id", tokenizer.unk_id),
        ("padding_token_id", tokenizer.pad_id),
    ):
        if index is not None:
            yield u32(f"ggml.{key}", index)
    for key, index in zip(ID_KEYS, stop_ids(tokenizer), strict=False):
        yield u32(f"ggml.{key}", index)


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids for eos, eot and eom: the document's end, then the ids that would not stop by their text alone.

    Raises ModelError if an id cannot be made to stop generation.
    """
    texts = {token.text for token in tokenizer.tokens}
    names = {index: tokenizer.tokens[index].text for index in tokenizer.eos_ids}
    unmade = [stop for stop, others in UNMADE_STOPS if stop in names.values() and texts >= others]
    first, rest = tokenizer.eos_ids[0], tokenizer.eos_ids[1:]
    unknown = [index for index in rest if names[index] not in EOG_TEXTS]
    if unmade or len(unknown) > 2:
        raise ModelError(
            "llama.cpp would not stop at all of the model's stop tokens",
            where="eos_token_id in generation_config.json",
            expected="at most three, besides those that llama.cpp knows by their text",
            found=", ".join(map(repr, unmade or (names[first], *(names[index] for index in unknown)))),
            mend="Remove the ones that the chat template does not use, or leave gguf out of the recipe's targets.",
        )
    return (first, *unknown, *(index for index in rest if index not in unknown))[:3]


def _add_space_prefix(tokenizer: Tokenizer) -> bool:
    """llama.cpp knows never and always. Where the model wants a space at the start of the text only, leave it out:
    chat prompts start with a special token, and then the model wants none."""
    if tokenizer.kind is TokenizerKind.BYTE_LEVEL_BPE and tokenizer.space_prefix is not SpacePrefix.NEVER:
        raise ModelError(
            "llama.cpp puts no space before the text for byte-level BPE",
            where="add_prefix_space in tokenizer.json",
            expected="false",
            found="true",
            mend="Leave gguf out of the recipe's targets.",
        )
    return tokenizer.space_prefix is SpacePrefix.ALWAYS


def safe_general_name(name: str, tokenizer: Tokenizer) -> str:
    """A value for general.name that gives added tokens the rstrip that the model has, as far as llama.cpp can.

    llama.cpp gives rstrip to all added tokens but PHI3_KEPT if the name contains phi-3 or phi3, and to none otherwise.
    The name is changed as little as that takes.
    """
    if wants_phi3(tokenizer):
        return name if PHI3_NAME.search(name) else f"{name} (Phi-3)"
    return PHI3_NAME.sub(lambda match: f"{match[0][:3]} 3", name)


def wants_phi3(tokenizer: Tokenizer) -> bool:
    if not {token.text for token in tokenizer.tokens} >= PHI3_REQUIRED:
        return False  # llama.cpp would not load the file
    return len(_wrong_strips(tokenizer, True)) < len(_wrong_strips(tokenizer, False))


def _wrong_strips(tokenizer: Tokenizer, phi3: bool) -> list[str]:
    """The added tokens whose rstrip llama.cpp gets wrong, with or without a Phi-3 name."""
    return [
        token.text
        for token in tokenizer.tokens
        if token.type in ADDED and token.rstrip != (phi3 and token.text not in PHI3_KEPT)
    ]
