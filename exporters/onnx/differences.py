"""What onnxruntime-genai's tokenizer does otherwise than transformers, whatever the files say, as kinds of text.

Each kind follows from the code of microsoft/onnxruntime-extensions (operators/tokenizer): bpe_kernels.cc encodes,
bpe_streaming.hpp decodes, bpe_tokenizer_model.hpp finds added tokens, bpe_utils.hpp has the regexes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any

from converters.json_file import read_json
from converters.tokenizer import SpacePrefix, Token, Tokenizer, TokenizerKind, TokenType
from exporters.base import Difference
from exporters.onnx.tokenizer_files import LINE_ENDS, LONGEST_MIXED_RUN, LONGEST_WORD, SPACE, TOKENIZER_JSON
from exporters.transformers_files import CONFIG

ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
NOWHERE = "(?!)"
STRIPPED = " \t\r\n"  # all that the runtime strips beside an added token
WHITE = "\t-\r \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
# tokenizer_files.WORDS, in characters instead of bytes.
WORD = re.compile(rf"[ {SPACE}]{{0,{LONGEST_WORD}}}[^ {SPACE}]{{1,{LONGEST_WORD}}}|[ {SPACE}]{{1,{LONGEST_WORD}}}")
# Letters, marks and digits of Unicode 14 to 16. The runtime's tables are of Unicode 13, those of tokenizers of 16.
NEWER = (
    "\u0870-\u0887\u0889-\u088e\u0897-\u089f\u08b5\u08c8-\u08d2\u0c3c\u0c5d\u0cdd\u0cf3\u0ece\u170d"
    "\u1715-\u171f\u180f\u1ac1-\u1ace\u1b4c\u1c89-\u1c8a\u1dfa\u2c2f\u2c5f\u9ffd-\u9fff\ua7c0-\ua7c1"
    "\ua7cb-\ua7f4\U00010570-\U000105f3\U00010780-\U000107ba\U00010d40-\U00010d85\U00010ec2-\U00010eff"
    "\U00010f70-\U00010f85\U00011070-\U00011075\U000110c2\U0001123f-\U00011241\U00011380-\U000113e2"
    "\U000116d0-\U000116e3\U00011740-\U00011746\U00011ab0-\U00011abf\U00011bc0-\U00011bf9"
    "\U00011f00-\U00011f5a\U00012f90-\U00012ff0\U0001342f\U00013440-\U000143fa\U00016100-\U00016139"
    "\U00016a70-\U00016ac9\U00016d40-\U00016d79\U00018cff\U0001aff0-\U0001affe\U0001b11f-\U0001b132\U0001b155"
    "\U0001ccf0-\U0001ccf9\U0001cf00-\U0001cf46\U0001d2c0-\U0001d2d3\U0001df00-\U0001df2a"
    "\U0001e030-\U0001e08f\U0001e290-\U0001e2ae\U0001e4d0-\U0001e4f9\U0001e5d0-\U0001e5fa"
    "\U0001e7e0-\U0001e7fe\U0002a6de-\U0002a6df\U0002b735-\U0002b739\U0002ebf0-\U0002ee5d"
    "\U00031350-\U00031fff"
)
# Classes for which transformers 5 makes the steps before the merges itself: Metaspace.
LLAMA_LINE = ("LlamaTokenizer", "CodeLlamaTokenizer")
Json = dict[str, Any]  # parsed JSON of a foreign format, which the converter has checked


def tokenizer_differences(tokenizer: Tokenizer) -> tuple[Difference, ...]:
    """The kinds that concern this tokenizer."""
    kinds = [
        _difference("nul", "A text ends at its first NUL character.", _has_nul),
        Difference("nul in an answer", "An answer ends at its first NUL character.", "decoding", _has_nul),
        Difference(
            "noncharacter in an answer",
            "An answer ends at its first U+FFFE or U+FFFF, and U+FFFD stands in its place.",
            "decoding",
            _has("[\ufffe\uffff]"),
        ),
        Difference(
            "nothing to print",
            "An answer of special tokens alone is printed as U+FFFD.",
            "decoding",
            _has(rf"\A(?:(?:{_any_of(_special(tokenizer))})[{WHITE}]*)*\Z"),
        ),
        *_added_token_differences(tokenizer),
    ]
    if tokenizer.kind is TokenizerKind.SENTENCEPIECE:
        kinds += _sentencepiece_differences(tokenizer)
    else:
        kinds += _byte_level_differences(tokenizer)
    return tuple(kinds)


def _difference(name: str, sentence: str, applies: Callable[[str], bool]) -> Difference:
    return Difference(name, sentence, "encoding", applies)


def _has_nul(text: str) -> bool:
    return "\0" in text


def _added(tokenizer: Tokenizer) -> list[Token]:
    return [token for token in tokenizer.tokens if token.type in ADDED]


def _special(tokenizer: Tokenizer) -> list[str]:
    return [token.text for token in _added(tokenizer) if token.type is not TokenType.USER_DEFINED]


def _any_of(texts: Iterable[str]) -> str:
    """A regex of the longest of these that is at a place; without any it matches nowhere."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or NOWHERE


def _has(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern)
    return lambda text: compiled.search(text) is not None


def _added_token_differences(tokenizer: Tokenizer) -> Iterator[Difference]:
    rstrip = _any_of(token.text for token in _added(tokenizer) if token.rstrip)
    if rstrip != NOWHERE:
        yield _difference(
            "white space after a token",
            "White space other than space, tab, CR and LF stays in the text right after an added token that should "
            "swallow it.",
            _has(f"(?:{rstrip})[{STRIPPED}]*(?![{STRIPPED}])[{WHITE}]"),
        )
    lstrip = _any_of(token.text for token in _added(tokenizer) if token.lstrip)
    if lstrip != NOWHERE:
        yield _difference(
            "white space before a token",
            "White space stays in the text right before an added token that should swallow it.",
            _has(f"[{WHITE}](?:{lstrip})"),
        )
    flags = _flags(tokenizer)
    words = _any_of(text for text, (single_word, _) in flags.items() if single_word)
    if words != NOWHERE:
        yield _difference(
            "token inside a word",
            "An added token that should be found as a word of its own is found inside of words too.",
            lambda text: any(_touches_a_word(match) for match in re.finditer(words, text)),
        )
    normalized = _any_of(text for text, (_, normalized) in flags.items() if normalized)
    if normalized != NOWHERE and not _is_metaspace(tokenizer) and tokenizer.kind is TokenizerKind.SENTENCEPIECE:
        yield _difference(
            "token in normalized text",
            "An added token that should be found only after a space, with which it belongs together, is found "
            "anywhere, and the space stays.",
            _has(normalized),
        )
        yield Difference(
            "token of normalized text in an answer",
            "An added token that belongs together with the space in front of it is printed without the space.",
            "decoding",
            _has(normalized),
        )


def _touches_a_word(match: re.Match[str]) -> bool:
    beside = (match.string[: match.start()][-1:], match.string[match.end() :][:1])
    return any(unicodedata.category(character)[0] in "LMN" or character == "_" for character in beside if character)


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


def _byte_level_differences(tokenizer: Tokenizer) -> Iterator[Difference]:
    yield _difference("next line", "U+0085 is cut like a punctuation mark, not like white space.", _has("\u0085"))
    yield _difference(
        "newer letters",
        "Letters, marks and digits that Unicode has had only since 2021 are cut like punctuation marks.",
        _has(f"[{NEWER}]"),
    )
    if any(r"[\r\n/]*" in pattern for pattern in tokenizer.split_patterns):
        yield _difference(
            "slash after a line end",
            "A slash in a line's first place is cut off from a punctuation mark at the end of the line before.",
            _has(r"(?:[^\s\w]|_)[\r\n]+/"),
        )
    if any(LINE_ENDS in pattern for pattern in tokenizer.split_patterns):
        yield _difference(
            "long white space",
            f"More than {LONGEST_WORD} white space characters in a row, or {LONGEST_MIXED_RUN} if some are not ASCII, "
            "may be cut.",
            _has_long_run,
        )


def _has_long_run(text: str) -> bool:
    runs = re.findall(f"[{WHITE}]+", text)
    return any(len(run) > (LONGEST_WORD if run.isascii() else LONGEST_MIXED_RUN) for run in runs)


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
        special = _any_of(_special(tokenizer))
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
        pieces = self._added.split(text)
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
