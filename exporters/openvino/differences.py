"""The kinds of text whose tokens in OpenVINO are not the model's, whatever the tokenizer's models say.

openvino-tokenizers finds added tokens in the text as it stands, before it is normalized (SpecialTokensSplit), and again
in what is left of it, whatever surrounds them (BPETokenizer, before it merges).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from unicodedata import category

from converters.tokenizer import Tokenizer, TokenizerKind, TokenType
from converters.tokenizer_json import ensure_tokenizer_json
from exporters.base import Difference

SPACE = "\u2581"
# \w of Rust's regex, by which the tokenizers library tells words.
WORD = ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc")
ADDED = frozenset((TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN))


def tokenizer_differences(tokenizer: Tokenizer) -> tuple[Difference, ...]:
    """Those that can occur with this tokenizer; none for most models."""
    added = [token for token in tokenizer.tokens if token.type in ADDED and token.text]
    found: list[Difference] = []
    words = [token.text for token in added if token.single_word]
    if words:
        sentence = f"Within a word, {_some(words)} is text in the model and a token in OpenVINO."
        found.append(Difference("token within a word", sentence, "encoding", _touches_a_word(words)))
    normalized = [token.text for token in added if token.normalized]
    prepends = '"Prepend"' in ensure_tokenizer_json(tokenizer)
    if normalized and tokenizer.kind is TokenizerKind.SENTENCEPIECE and prepends:
        sentence = f"The model looks for {_some(normalized)} after a space alone, which belongs to the token."
        found.append(Difference("normalized token", sentence, "encoding", _has(_any(normalized))))
        # Only there does the model's tokenizer find such a token.
        after = _any([" ", SPACE, *(token.text for token in added if not token.normalized)])
        sentence = f"The model prints a space before {_some(normalized)}, which OpenVINO does not."
        printed = _has(after + _any(normalized))
        found.append(Difference("normalized token, printed", sentence, "decoding", printed))
    return tuple(found)


def _has(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern)
    return lambda text: compiled.search(text) is not None


def _touches_a_word(texts: list[str]) -> Callable[[str], bool]:
    compiled = re.compile(_any(texts))

    def applies(text: str) -> bool:
        beside = (
            (text[found.start() - 1 : found.start()], text[found.end() :][:1]) for found in compiled.finditer(text)
        )
        return any(_in_a_word(letter) for letters in beside for letter in letters)

    return applies


def _in_a_word(letter: str) -> bool:
    return bool(letter) and (letter in "\u200c\u200d" or category(letter) in WORD)


def _any(texts: Iterable[str]) -> str:
    return "(?:" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")"


def _some(texts: list[str]) -> str:
    shown = ", ".join(sorted(texts)[:3])
    return shown if len(texts) <= 3 else f"{shown} and {len(texts) - 3} more"
