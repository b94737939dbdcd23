"""What onnxruntime-genai's tokenizer does otherwise than transformers, whatever the files say, as kinds of text.

Each kind follows from the code of microsoft/onnxruntime-extensions (operators/tokenizer): bpe_kernels.cc encodes,
bpe_streaming.hpp decodes, bpe_tokenizer_model.hpp finds added tokens, bpe_utils.hpp has the regexes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any

from converters.json_file import read_json
from converters.tokenizer import SpacePrefix, Token, Tokenizer, TokenizerKind, TokenType
from exporters.base import Difference
from exporters.onnx.tokenizer_files import CONFIG, LONGEST_WORD, SPACE, TOKENIZER_JSON

ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
STRIPPED = " \t\r\n"  # all that the runtime strips beside an added token
WHITE = "\t-\r \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
# tokenizer_files.WORDS, in characters instead of bytes.
WORD = re.compile(
    rf"[ {SPACE}]{{0,{LONGEST_WORD}}}[^ {SPACE}]{{1,{LONGEST_WORD}}}|[ {SPACE}]{{1,{LONGEST_WORD}}}", re.DOTALL
)
# Classes for which transformers 5 makes the steps before the merges itself: Metaspace.
LLAMA_LINE = ("LlamaTokenizer", "CodeLlamaTokenizer")
Json = dict[str, Any]  # parsed JSON of a foreign format, which the converter has checked


def tokenizer_differences(tokenizer: Tokenizer) -> tuple[Difference, ...]:
    """The kinds that concern this tokenizer."""
    kinds = [
        _difference("nul", "A text ends at its first NUL character.", _has_nul),
        Difference("nul in an answer", "An answer ends at its first NUL character.", "decoding", _has_nul),
        *_added_token_differences(tokenizer),
    ]
    if tokenizer.kind is TokenizerKind.SENTENCEPIECE:
        kinds += _sentencepiece_differences(tokenizer)
    return tuple(kinds)


def _difference(name: str, sentence: str, applies: Callable[[str], bool]) -> Difference:
    return Difference(name, sentence, "encoding", applies)


def _has_nul(text: str) -> bool:
    return "\0" in text


def _added(tokenizer: Tokenizer) -> list[Token]:
    return [token for token in tokenizer.tokens if token.type in ADDED]


def _any_of(texts: Iterable[str]) -> str:
    """A regex of the longest of these that is at a place."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


def _has(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern)
    return lambda text: compiled.search(text) is not None


def _added_token_differences(tokenizer: Tokenizer) -> Iterator[Difference]:
    rstrip = _any_of(token.text for token in _added(tokenizer) if token.rstrip)
    if rstrip:
        yield _difference(
            "white space after a token",
            "White space other than space, tab, CR and LF stays in the text right after an added token that should "
            "swallow it.",
            _has(f"(?:{rstrip})[{STRIPPED}]*(?![{STRIPPED}])[{WHITE}]"),
        )
    lstrip = _any_of(token.text for token in _added(tokenizer) if token.lstrip)
    if lstrip:
        yield _difference(
            "white space before a token",
            "White space stays in the text right before an added token that should swallow it.",
            _has(f"[{WHITE}](?:{lstrip})"),
        )
    flags = _flags(tokenizer)
    words = _any_of(text for text, (single_word, _) in flags.items() if single_word)
    if words:
        yield _difference(
            "token inside a word",
            "An added token that should be found as a word of its own is found inside of words too.",
            _has(rf"\w(?:{words})|(?:{words})\w"),
        )
    normalized = _any_of(text for text, (_, normalized) in flags.items() if normalized)
    if normalized and not _is_metaspace(tokenizer) and tokenizer.kind is TokenizerKind.SENTENCEPIECE:
        yield _difference(
            "token in normalized text",
            "An added token that should be found only after a space, with which it belongs together, is found "
            "anywhere, and the space stays.",
            _has(normalized),
        )


def _flags(tokenizer: Tokenizer) -> dict[str, tuple[bool, bool]]:
    """Added tokens by text: single_word, normalized."""
    decoder: Json = _json(tokenizer, CONFIG).get("added_tokens_decoder") or {}
    items: list[Json] = [*(_json(tokenizer, TOKENIZER_JSON).get("added_tokens") or []), *decoder.values()]
    return {item["content"]: (bool(item.get("single_word")), bool(item.get("normalized"))) for item in items}


def _json(tokenizer: Tokenizer, name: str) -> Json:
    document: Json = read_json(tokenizer.files[name]) if name in tokenizer.files else {}
    return document


def _is_metaspace(tokenizer: Tokenizer) -> bool:
    """Whether transformers puts no space in front of a text that has one there."""
    if TOKENIZER_JSON not in tokenizer.files:
        return True
    if str(_json(tokenizer, CONFIG).get("tokenizer_class")).removesuffix("Fast") in LLAMA_LINE:
        return True
    return "Metaspace" in str(_json(tokenizer, TOKENIZER_JSON).get("pre_tokenizer"))


def _sentencepiece_differences(tokenizer: Tokenizer) -> Iterator[Difference]:
    parts = _Parts(tokenizer)
    added = _any_of(token.text for token in _added(tokenizer))
    if tokenizer.space_prefix is SpacePrefix.FIRST:
        yield _difference(
            "no first space",
            "The first word of a text that begins with no added token (a chat begins with one) gets no space in front.",
            _has(rf"\A(?![ {SPACE}]|{added})[\s\S]"),
        )
        yield Difference(
            "space in front",
            "A decoded answer keeps the space in front of its first word.",
            "decoding",
            _has(rf"\A(?:(?:{added})+[ {SPACE}]|(?!{added})[\s\S])"),
        )
    if tokenizer.space_prefix is SpacePrefix.ALWAYS:
        if _is_metaspace(tokenizer):
            yield _difference(
                "two first spaces",
                "A text, or what follows an added token, that begins with a space gets one more.",
                lambda text: any(part.startswith((" ", SPACE)) for part in parts.of(text)),
            )
        special = _any_of(token.text for token in _added(tokenizer) if token.type is not TokenType.USER_DEFINED)
        inside = rf"\A(?:{special})*(?!{special})[\s\S][\s\S]*(?:{special})[\s\S]"
        yield Difference(
            "space in front",
            "A decoded answer keeps the space in front of its first word, unless a special token comes before, and "
            "loses the space after special tokens further in.",
            "decoding",
            _has(inside if tokenizer.add_bos else rf"\A(?!{special})[\s\S]|{inside}"),
        )
    yield _difference(
        "cut inside a piece",
        f"More than {LONGEST_WORD} characters without a space may be cut inside a piece. So may a text, or what "
        "follows an added token, where it begins with a space: at any CR or LF.",
        lambda text: any(map(parts.is_cut, parts.of(text))),
    )
    yield _difference(
        "byte tokens as text",
        "The spelling of a byte token (such as <0x0A>) that stands alone becomes that byte.",
        lambda text: any(map(parts.is_byte_spelling, parts.of(text))),
    )


class _Parts:
    """The parts of a text between added tokens, and how the runtime cuts each before it merges."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._prefix = SPACE if tokenizer.space_prefix is SpacePrefix.ALWAYS else ""
        self._added = re.compile(f"({_any_of(token.text for token in _added(tokenizer))})")
        self._rstrip = {token.text for token in _added(tokenizer) if token.rstrip}

    @cached_property
    def _neighbours(self) -> set[tuple[str, str]]:
        """Characters that stand beside each other in a piece."""
        texts = (token.text for token in self._tokenizer.tokens if token.type is TokenType.NORMAL)
        return {pair for text in texts for pair in pairwise(text)}

    @cached_property
    def _spellings(self) -> set[str]:
        return {token.text for token in self._tokenizer.tokens if token.type is TokenType.BYTE}

    @cached_property
    def _pieces(self) -> set[str]:
        return {token.text for token in self._tokenizer.tokens if token.type is TokenType.NORMAL}

    def of(self, text: str) -> Iterator[str]:
        pieces = self._added.split(text) if self._added.pattern != "()" else [text]
        for index in range(0, len(pieces), 2):
            part = pieces[index]
            if index and pieces[index - 1] in self._rstrip:
                part = part.lstrip(STRIPPED)
            if part:
                yield part

    def is_cut(self, part: str) -> bool:
        """Whether the runtime cuts this part where a piece could be."""
        text = self._prefix + part
        as_pieces = text.replace(" ", SPACE)
        return any((as_pieces[place - 1], as_pieces[place]) in self._neighbours for place in self._cuts(text))

    def is_byte_spelling(self, part: str) -> bool:
        text = self._prefix + part
        if self._walks(text):
            return False
        return any(match[0] in self._spellings for match in WORD.finditer(text))

    def _walks(self, text: str) -> bool:
        """Whether the runtime takes the way of Gemma's class, regex or not."""
        return bool(self._prefix) and text.startswith(" ", 1)

    def _cuts(self, text: str) -> Iterator[int]:
        if not self._walks(text):
            yield from (match.start() for match in WORD.finditer(text) if match.start())
            return
        length = 0  # tokens before merging: characters, or bytes of those that are no token
        for place, character in enumerate(text):
            ends = character in f" \n\r{SPACE}" and place and text[place - 1] not in f" \n\r{SPACE}"
            if (length > 10 and ends) or length > 100:
                yield place
                length = 0
            known = character.isascii() or character in self._pieces
            length += 1 if known else len(character.encode())
