"""The kinds of text whose tokens in llama.cpp are not the model's, because no key of the file can say them.

Facts are those of llama.cpp's src/llama-vocab.cpp (tokenizer_st_partition, tokenize and detokenize, as of commit
00ad355e of ggml-org/llama.cpp, 2026). It looks for each added token in the text as it stands, knows no single_word and
no normalized, has rstrip for Phi-3 alone and for ASCII white space, and puts a space before a piece of text always or
never.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from unicodedata import category

from converters.tokenizer import SpacePrefix, Token, Tokenizer, TokenizerKind, TokenType
from converters.tokenizer_json import ensure_tokenizer_json
from exporters.base import Difference
from exporters.gguf.pretokenizer import PreTokenizerRow, identify_pre, pieces, splits
from exporters.gguf.vocab import ADDED, CONTROL_TEXTS, PHI3_KEPT, wants_phi3

# White space of Unicode, as the tokenizers library swallows it; llama.cpp asks C's isspace about each byte.
ASCII_BLANKS = r"\t\n\v\f\r "
BLANKS = rf"{ASCII_BLANKS}\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
SPACE = "\u2581"
# What llama_detokenize takes a space out of, where it cleans: before ?!., and contractions, around a lone apostrophe.
CLEANED = re.compile(r" [?!.,]| ' | '(?:s|m|re|ve)")


def tokenizer_differences(tokenizer: Tokenizer) -> tuple[Difference, ...]:
    """Those that can occur with this tokenizer; none for most models."""
    added = [token for token in tokenizer.tokens if token.type in ADDED]
    row = identify_pre(tokenizer) if tokenizer.kind is TokenizerKind.BYTE_LEVEL_BPE else None
    return (
        *_added_tokens(tokenizer, added),
        *_named_control(tokenizer),
        *_spaces(tokenizer, added),
        *(() if row is None else _pre_tokenizer(tokenizer, row, added)),
    )


def _added_tokens(tokenizer: Tokenizer, added: list[Token]) -> Iterator[Difference]:
    phi3 = wants_phi3(tokenizer)
    stripping = {token.text for token in added if phi3 and token.text not in PHI3_KEPT}
    kept = [token.text for token in added if token.rstrip and token.text not in stripping]
    lost = [token.text for token in added if not token.rstrip and token.text in stripping]
    both = [token.text for token in added if token.rstrip and token.text in stripping]
    if kept:
        sentence = f"White space after {_some(kept)} belongs to the token in the model; llama.cpp keeps it as text."
        yield Difference("white space after a token", sentence, "encoding", _finds(rf"{_any(kept)}[{BLANKS}]"))
    if lost:
        sentence = f"White space after {_some(lost)} is text in the model; llama.cpp leaves it out."
        yield Difference("white space lost", sentence, "encoding", _finds(rf"{_any(lost)}[{ASCII_BLANKS}]"))
    if both:
        sentence = f"White space after {_some(both)} belongs to the token; llama.cpp leaves out ASCII's alone."
        other = rf"{_any(both)}[{ASCII_BLANKS}]*(?![{ASCII_BLANKS}])[{BLANKS}]"
        yield Difference("other white space after a token", sentence, "encoding", _finds(other))
    left = [token.text for token in added if token.lstrip]
    if left:
        sentence = f"White space before {_some(left)} belongs to the token in the model; llama.cpp keeps it as text."
        yield Difference("white space before a token", sentence, "encoding", _finds(rf"[{BLANKS}]{_any(left)}"))
    words = [token.text for token in added if token.single_word]
    if words:
        sentence = f"Within a word, {_some(words)} is text in the model and a token in llama.cpp."
        yield Difference("token within a word", sentence, "encoding", _touches_a_word(_any(words)))
    normalized = [token.text for token in added if token.normalized]
    if normalized and tokenizer.kind is TokenizerKind.SENTENCEPIECE:
        sentence = f"The model looks for {_some(normalized)} in normalized text, where spaces are {SPACE}."
        yield Difference("normalized token", sentence, "encoding", _finds(_any(normalized)))
        if '"Prepend"' in ensure_tokenizer_json(tokenizer):
            sentence = f"The model prints a space before {_some(normalized)}, which llama.cpp does not."
            yield Difference("normalized token, printed", sentence, "decoding", _finds(_any(normalized)))


def _named_control(tokenizer: Tokenizer) -> Iterator[Difference]:
    plain = [token.text for token in tokenizer.tokens if token.type is TokenType.NORMAL and token.text in CONTROL_TEXTS]
    if plain:
        sentence = f"llama.cpp takes {_some(plain)} for control tokens because of their text."
        yield Difference("control by name", sentence, "encoding", _finds(_any(plain)))
    named = [
        *plain,
        *(t.text for t in tokenizer.tokens if t.type is TokenType.USER_DEFINED and t.text in CONTROL_TEXTS),
    ]
    if named:
        sentence = f"llama.cpp prints nothing for {_some(named)}, which it takes for control tokens."
        yield Difference("control by name, printed", sentence, "decoding", _finds(_any(named)))


def _spaces(tokenizer: Tokenizer, added: list[Token]) -> Iterator[Difference]:
    if tokenizer.kind is not TokenizerKind.SENTENCEPIECE:
        return
    prefix, file = tokenizer.space_prefix, ensure_tokenizer_json(tokenizer)
    after = _any(token.text for token in added)
    unprinted = _any(token.text for token in added if token.type is not TokenType.USER_DEFINED)
    if prefix is SpacePrefix.FIRST:
        sentence = (
            "The model wants a space in front of a text that does not begin with a special token, and there only; "
            "llama.cpp can add it everywhere or nowhere, and here adds none."
        )
        yield Difference("first space", sentence, "encoding", _finds(rf"\A(?!{after})(?![ {SPACE}])[\s\S]"))
        sentence = "llama.cpp prints the space that the model has in front of a text."
        shown = rf"\A(?!{after})[\s\S]|\A{unprinted}+[ {SPACE}]"
        yield Difference("first space, printed", sentence, "decoding", _finds(shown))
    elif prefix is SpacePrefix.NEVER and '"Strip"' in file:
        sentence = "The model's decoder leaves out a space at the start of a text; llama.cpp prints it."
        yield Difference("first space, printed", sentence, "decoding", _finds(rf"\A{unprinted}*[ {SPACE}]"))
    elif prefix is SpacePrefix.ALWAYS and tokenizer.metaspace:
        sentence = "Before a text or a part of it that begins with a space, the model adds none; llama.cpp adds one."
        yield Difference("space before a space", sentence, "encoding", _finds(rf"(?:\A|{after})[ {SPACE}]"))


def _pre_tokenizer(tokenizer: Tokenizer, row: PreTokenizerRow, added: list[Token]) -> Iterator[Difference]:
    specials = re.compile(_any(token.text for token in added))
    if splits(row.patterns) != splits(tokenizer.split_patterns):
        sentence = f"llama.cpp's pre-tokenizer {row.name} stands for this one, but {row.difference}."

        def cut_differently(text: str) -> bool:
            parts = [part for part in specials.split(text) if part]
            return any(pieces(row.patterns, part) != pieces(tokenizer.split_patterns, part) for part in parts)

        yield Difference("words cut differently", sentence, "encoding", cut_differently)
    if row.cleans:
        control = re.compile(_any(token.text for token in added if token.type is not TokenType.USER_DEFINED))
        sentence = (
            "llama_detokenize leaves out the space before . , ! ? 's 'm 're 've and around a lone '; what prints "
            "token by token, as llama-cli and llama-server do, keeps it."
        )
        yield Difference(
            "spaces cleaned", sentence, "decoding", lambda text: bool(CLEANED.search(control.sub("", text)))
        )


def _finds(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern)
    return lambda text: compiled.search(text) is not None


def _touches_a_word(pattern: str) -> Callable[[str], bool]:
    """Whether a letter, digit, mark or joiner is next to a match: what the tokenizers library takes for a word's."""
    compiled = re.compile(pattern)

    def applies(text: str) -> bool:
        neighbours = (
            text[max(found.start() - 1, 0) : found.start()] + text[found.end() : found.end() + 1]
            for found in compiled.finditer(text)
        )
        return any(_in_a_word(letter) for letters in neighbours for letter in letters)

    return applies


def _in_a_word(letter: str) -> bool:
    return letter.isalnum() or category(letter)[0] == "M" or category(letter) == "Pc" or letter in "\u200c\u200d"


def _any(texts: Iterable[str]) -> str:
    """A pattern of any of the texts, the longest first; one that is never found if there is none."""
    return f"(?:{'|'.join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or '(?!)'})"


def _some(texts: list[str]) -> str:
    shown = ", ".join(map(repr, texts[:3]))
    return shown if len(texts) <= 3 else f"{shown} and {len(texts) - 3} more tokens"
