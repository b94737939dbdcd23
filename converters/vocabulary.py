"""The parts of a tokenizer record: tokens and their types, and what a vocabulary file states on its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from converters.errors import ModelError

MAX_TOKENS = 1 << 21  # several times the largest vocabulary: a configuration may state any size
MAX_TEXT = 1 << 12  # characters of a token: what looks for its parts takes the square of that


class TokenizerKind(Enum):
    """The algorithm: SentencePiece-style BPE with scores and byte fallback, or byte-level BPE with merges."""

    SENTENCEPIECE = "sentencepiece"
    BYTE_LEVEL_BPE = "byte-level BPE"


class TokenType(Enum):
    """What a token is, as far as encoding and printing it goes."""

    NORMAL = "normal"
    UNKNOWN = "unknown"
    CONTROL = "control"
    USER_DEFINED = "user defined"
    UNUSED = "unused"
    BYTE = "byte"


class SpacePrefix(Enum):
    """Where encoding puts a space that the text does not have."""

    NEVER = "never"
    FIRST = "at the start of the text"
    ALWAYS = "at the start of the text and after each added token"


@dataclass(frozen=True, slots=True)
class Token:
    """One row of the vocabulary. `score` orders SentencePiece merges and is 0 elsewhere.

    Added tokens (control and user defined ones) are plain text; the others are spelled in the vocabulary's own
    alphabet: U+2581 for a space in SentencePiece, GPT-2's 256 printable characters for bytes in byte-level BPE.
    lstrip and rstrip: an added token swallows the white space before or after it. single_word: it is found only between
    what are no letters. normalized: it is looked for last, in the text as the normalizer leaves it.
    """

    text: str
    type: TokenType
    score: float = 0.0
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in the text before anything else, and, where `special`, never printed."""

    text: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


def added_token(item: object, special: bool, where: str) -> AddedToken:
    """The token of a file's JSON: its text alone, or an object with content and flags. ModelError if it is neither."""
    fields: Mapping[str, object] = item if isinstance(item, dict) else {"content": item}
    text = fields.get("content")
    flags = {"special": special, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    stated = {name: fields.get(name, default) for name, default in flags.items()}
    flags |= {name: flag for name, flag in stated.items() if isinstance(flag, bool)}
    if not isinstance(text, str) or not text or flags != stated:
        raise ModelError(
            "malformed added token",
            where=where,
            expected="a text, or an object with content and flags",
            found=_shown(item),
        )
    return AddedToken(text, **flags)


def checked_id(value: object, where: str) -> int:
    """A token id of a file's JSON. ModelError if it is none."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ModelError("impossible token id", where=where, expected="an integer, 0 or above", found=_shown(value))
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What one vocabulary file (tokenizer.json or tokenizer.model) states. `tokens` is by id and may have gaps.

    `prefix` and `suffix` are the special tokens that the file itself puts around each text. `ignore_merges`: a word
    that is in the vocabulary is one token, whatever the merges say. `metaspace`: what begins with a space gets none in
    front.
    """

    kind: TokenizerKind
    tokens: Mapping[int, Token]
    merges: tuple[tuple[str, str], ...] = ()
    split_patterns: tuple[str, ...] = ()
    ignore_merges: bool = False
    space_prefix: SpacePrefix = SpacePrefix.NEVER
    metaspace: bool = False
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()

    def ids(self) -> dict[str, int]:
        """Token id by text."""
        return {token.text: index for index, token in self.tokens.items()}


def with_added(tokens: Mapping[int, Token], added: Mapping[int, AddedToken], where: str) -> dict[int, Token]:
    """`tokens` with added ones put in their places; a token that is there already becomes an added one.

    Raises ModelError where an id already belongs to another text.
    """
    result = dict(tokens)
    for index, new in sorted(added.items()):
        old = result.get(index)
        if old is not None and old.text != new.text:
            raise ModelError(
                f"added token {new.text!r} has the id of another token",
                where=where,
                expected=f"{old.text!r} at id {index}",
                found=repr(new.text),
                mend="The tokenizer files come from different models: fetch the checkpoint again.",
            )
        result[index] = Token(
            new.text,
            _added_type(old, new),
            old.score if old else 0.0,
            lstrip=new.lstrip,
            rstrip=new.rstrip,
            single_word=new.single_word,
            normalized=new.normalized,
        )
    return result


def _added_type(old: Token | None, new: AddedToken) -> TokenType:
    if old is not None and old.type is TokenType.UNKNOWN:
        return TokenType.UNKNOWN
    return TokenType.CONTROL if new.special else TokenType.USER_DEFINED


def padded(tokens: Mapping[int, Token], vocab_size: int, where: str) -> tuple[Token, ...]:
    """Exactly `vocab_size` rows: ids without a token get unused ones. Raises ModelError for ids beyond."""
    if vocab_size > MAX_TOKENS:
        expected = f"at most {MAX_TOKENS}"
        raise ModelError("vocab_size is too large", where=where, expected=expected, found=str(vocab_size))
    longest = max((token.text for token in tokens.values()), key=len, default="")
    if len(longest) > MAX_TEXT:
        found = f"{longest[:20]!r} and {len(longest) - 20} characters more"
        raise ModelError("a token is too long", where=where, expected=f"at most {MAX_TEXT} characters", found=found)
    beyond = sorted(index for index in tokens if not 0 <= index < vocab_size)
    if beyond:
        raise ModelError(
            "the tokenizer does not match the model's vocab_size",
            where=where,
            expected=f"token ids below {vocab_size}",
            found=f"{len(beyond)} beyond, the first is {tokens[beyond[0]].text!r} with id {beyond[0]}",
            mend="The tokenizer files and config.json come from different models, or tokens were added without "
            "resizing the embedding: take both from the same checkpoint.",
        )
    texts = {token.text for token in tokens.values()}
    rows = [tokens.get(index) or _filler(index, texts) for index in range(vocab_size)]
    for text, count in Counter(token.text for token in rows).items():
        if count > 1:
            raise ModelError(f"{count} token ids have the same text", where=where, found=repr(text))
    return tuple(rows)


def _filler(index: int, texts: set[str]) -> Token:
    text = f"[PAD{index}]"
    while text in texts:
        text = f"[{text}]"
    return Token(text, TokenType.UNUSED)


def is_filler(index: int, token: Token) -> bool:
    """Whether a row is there only to fill the vocabulary up to the embedding's size."""
    return token.type is TokenType.UNUSED and token.text.strip("[]") == f"PAD{index}"
