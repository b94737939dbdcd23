"""Tokenizer files of a checkpoint, read into one neutral record that exporters turn into their container's form.

The record says what transformers 5 does with these files:

1. tokenizer.json is the vocabulary; without one, SentencePiece's tokenizer.model is.
2. LlamaTokenizer takes vocabulary and merges alone, and puts spaces in front with a Metaspace of its own; without
   tokenizer.json, it merges in the order of the ids, not of the scores. Other classes take the file as it is.
3. added_tokens_decoder of tokenizer_config.json adds tokens and overrides flags; checkpoints without it have
   added_tokens.json and special_tokens_map.json instead.
4. The post-processor of tokenizer.json says whether BOS and EOS frame a text; add_bos_token and add_eos_token do where
   there is no such file.
5. chat_template.jinja wins over chat_template in tokenizer_config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters.config import ModelConfig
from converters.errors import ModelError
from converters.fast_tokenizer import read_fast_tokenizer
from converters.json_file import inside, read_json, read_small
from converters.sentencepiece_model import read_sentencepiece
from converters.vocabulary import (
    AddedToken,
    SpacePrefix,
    Token,
    TokenizerKind,
    TokenType,
    Vocabulary,
    added_token,
    checked_id,
    padded,
    with_added,
)

__all__ = ["SpacePrefix", "Token", "TokenType", "Tokenizer", "TokenizerKind", "read_tokenizer"]

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# What a class takes for special tokens that no file names.
NAME_DEFAULTS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
}
LLAMA = "LlamaTokenizer"
# Families whose checkpoints state a class that transformers knows to be wrong: it takes tokenizer.json as it is.
WITHOUT_CLASS = frozenset(("mistral", "phi3"))
_MAX_TEMPLATE = 1 << 20  # bytes; long ones have a few thousand
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Json = dict[str, Any]  # parsed JSON of a foreign format: each field is checked where it is used


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Everything that turns text into ids and back. `tokens` has exactly vocab_size rows, padded with UNUSED ones."""

    kind: TokenizerKind
    tokens: tuple[Token, ...]
    merges: tuple[tuple[str, str], ...]
    split_patterns: tuple[str, ...]  # pre-tokenizer regexes of byte-level BPE, in order; empty for SentencePiece
    ignore_merges: bool  # a word that is in the vocabulary is one token, whatever the merges say
    space_prefix: SpacePrefix
    add_bos: bool
    add_eos: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]  # the first one ends a document, all of them stop generation
    pad_id: int | None
    unk_id: int | None
    chat_template: str | None
    files: Mapping[str, Path]  # the checkpoint's own files by name, for containers that take them as they are
    metaspace: bool = False  # no space is put in front of what begins with one
    remade: bool = False  # transformers does not take the steps of tokenizer.json before and after the merges


def read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    The model's configuration has the size of the vocabulary and the ids that stop generation, and fills in what the
    tokenizer files leave open. Raises ModelError for files that are missing, damaged, of an unsupported kind, or do
    not match the size.
    """
    try:
        return _record(folder, config)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(
            "the tokenizer files cannot be read",
            where=str(folder),
            found=f"{type(error).__name__}: {error}",
            mend="Fetch the tokenizer files of the model again.",
        ) from error


def _record(folder: Path, config: ModelConfig) -> Tokenizer:
    files = {name: inside(folder, name) for name in FILES if (folder / name).is_file()}
    settings = _read_json(files, "tokenizer_config.json")
    cls = "" if config.family in WITHOUT_CLASS else str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    vocabulary, where = _read_vocabulary(files, settings, cls, folder)
    remade = cls == LLAMA and vocabulary.kind is TokenizerKind.SENTENCEPIECE
    if remade:
        vocabulary = replace(vocabulary, space_prefix=_own_prefix(settings), metaspace=True)
    names = _special_names(files, settings, cls)
    tokens = with_added(vocabulary.tokens, _added_tokens(files, settings, names, vocabulary), where)
    ids = {token.text: index for index, token in tokens.items()}
    unknown = ids.get(names.get("unk_token", ""))
    if unknown is not None and vocabulary.kind is TokenizerKind.SENTENCEPIECE:  # the model itself may name none
        tokens[unknown] = replace(tokens[unknown], type=TokenType.UNKNOWN)
    rows = padded(tokens, config.vocab_size, where)
    bos, eos = _frame(vocabulary, settings, names, where)
    for text in (bos, eos):
        if text is not None and text not in ids:
            raise ModelError(
                "the tokenizer puts a special token around texts that it does not have", where=where, found=repr(text)
            )
    bos_id = ids.get(bos or names.get("bos_token", ""), config.bos_token_id)
    tokenizer = Tokenizer(
        kind=vocabulary.kind,
        tokens=rows,
        merges=vocabulary.merges,
        split_patterns=vocabulary.split_patterns,
        ignore_merges=vocabulary.ignore_merges,
        space_prefix=vocabulary.space_prefix,
        add_bos=bos is not None,
        add_eos=eos is not None,
        bos_id=bos_id,
        eos_ids=_eos_ids(config.eos_token_ids, ids.get(eos or names.get("eos_token", ""))),
        pad_id=ids.get(names.get("pad_token", ""), config.pad_token_id),
        unk_id=unknown,
        chat_template=_chat_template(files, settings),
        files=files,
        metaspace=vocabulary.metaspace,
        remade=remade,
    )
    _check_special_ids(tokenizer, where)
    return tokenizer


def _eos_ids(configured: Sequence[int], own: int | None) -> tuple[int, ...]:
    """The model's stop ids without repeats. The tokenizer's own EOS, if it is one of them, goes first; it stands in
    where the model names none."""
    ids = tuple(dict.fromkeys(configured))
    if own is None:
        return ids
    return (own, *(index for index in ids if index != own)) if own in ids or not ids else ids


def _read_json(files: Mapping[str, Path], name: str) -> Json:
    return read_json(files[name]) if name in files else {}


def _read_vocabulary(files: Mapping[str, Path], settings: Json, cls: str, folder: Path) -> tuple[Vocabulary, str]:
    if "tokenizer.json" not in files and "tokenizer.model" not in files:
        raise ModelError(
            "the checkpoint has no tokenizer",
            where=str(folder),
            expected="tokenizer.json or tokenizer.model",
            found=", ".join(sorted(files)) or "no tokenizer files",
            mend="Copy the tokenizer files of the model into the folder.",
        )
    if "tokenizer.model" not in files:
        return read_fast_tokenizer(files["tokenizer.json"]), "tokenizer.json"
    if "tokenizer.json" not in files:
        vocabulary = read_sentencepiece(files["tokenizer.model"])
        if cls == LLAMA:
            return replace(vocabulary, tokens=_scored_by_id(vocabulary.tokens)), "tokenizer.model"
        first = vocabulary.space_prefix is SpacePrefix.ALWAYS and not settings.get("legacy", True)
        prefix = SpacePrefix.FIRST if first else vocabulary.space_prefix
        return replace(vocabulary, space_prefix=prefix, metaspace=first), "tokenizer.model"
    vocabulary = read_fast_tokenizer(files["tokenizer.json"])
    if vocabulary.kind is TokenizerKind.SENTENCEPIECE:
        vocabulary = _with_scores(vocabulary, read_sentencepiece(files["tokenizer.model"]))
    return vocabulary, "tokenizer.json"


def _own_prefix(settings: Json) -> SpacePrefix:
    """Where transformers' LlamaTokenizer puts a space."""
    if settings.get("add_prefix_space") is False:
        return SpacePrefix.NEVER
    return SpacePrefix.ALWAYS if settings.get("legacy") else SpacePrefix.FIRST


def _scored_by_id(tokens: Mapping[int, Token]) -> dict[int, Token]:
    return {
        index: replace(token, score=-float(index)) if token.type is TokenType.NORMAL else token
        for index, token in tokens.items()
    }


def _with_scores(vocabulary: Vocabulary, model: Vocabulary) -> Vocabulary:
    """Scores and types of tokenizer.model, if tokenizer.json has all of its pieces at the same ids, and merges in the
    order of these scores."""
    tokens = dict(vocabulary.tokens)
    for index, piece in model.tokens.items():
        token = tokens.get(index)
        if token is None or token.text != piece.text:
            return vocabulary  # another model's, or an older one: tokenizer.json decides
        if token.type is TokenType.NORMAL:
            tokens[index] = replace(token, score=piece.score, type=piece.type)
    scores = {token.text: token.score for token in tokens.values()}
    order = [scores[left + right] for left, right in vocabulary.merges]
    return replace(vocabulary, tokens=tokens) if order == sorted(order, reverse=True) else vocabulary


def _special_names(files: Mapping[str, Path], settings: Json, cls: str) -> dict[str, str]:
    """The text of bos_token, eos_token and so on. tokenizer_config.json goes before special_tokens_map.json, unless
    it is of the old kind without added_tokens_decoder."""
    layers = {"tokenizer_config.json": settings}
    if "added_tokens_decoder" not in settings:
        layers["special_tokens_map.json"] = _read_json(files, "special_tokens_map.json")
    names = dict(NAME_DEFAULTS.get(cls if "tokenizer.json" in files else LLAMA, {}))
    for file, layer in layers.items():
        for name in NAMES:
            if layer.get(name) not in (None, ""):
                names[name] = added_token(layer[name], True, f"{file}, key {name}").text
            elif name in layer:  # there is none
                names.pop(name, None)
    return names


def _added_tokens(
    files: Mapping[str, Path], settings: Json, names: Mapping[str, str], vocabulary: Vocabulary
) -> dict[int, AddedToken]:
    """Tokens that the files beside the vocabulary add or give other flags, by id."""
    ids = vocabulary.ids()
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in settings:
        for index, token in _decoder_rows(settings["added_tokens_decoder"]):
            # A token that has a name is special, unless the vocabulary has it as it is here.
            if token.text in names.values() and not _is_same(vocabulary.tokens.get(index), token):
                token = replace(token, special=True)
            added[index] = token
    else:
        flags = _special_flags(files)
        for text, index in _read_json(files, "added_tokens.json").items():
            new = flags.get(text) or added_token(text, text in names.values(), "added_tokens.json")
            new = replace(new, normalized=new.normalized or not new.special)  # as transformers takes this old file
            added[checked_id(index, f"added_tokens.json, token {text!r}")] = new
        for text, token in flags.items():
            if text in ids and vocabulary.tokens[ids[text]].type not in (TokenType.CONTROL, TokenType.USER_DEFINED):
                added.setdefault(ids[text], token)
    # A special token that is only named is one all the same; one that exists nowhere goes to the end.
    ids |= {token.text: index for index, token in added.items()}
    for text in (*names.values(), *_more_special(settings)):
        index = ids.setdefault(text, max(ids.values()) + 1)
        known = vocabulary.tokens.get(index)
        if index not in added and (known is None or known.type is TokenType.NORMAL):
            added[index] = AddedToken(text, special=True)
    return added


def _more_special(settings: Json) -> list[str]:
    """Special tokens without a name of their own: a list since transformers 5, names and texts before."""
    key = "extra_special_tokens" if settings.get("extra_special_tokens") else "additional_special_tokens"
    where = f"tokenizer_config.json, key {key}"
    more = settings.get(key) or []
    if not isinstance(more, list | dict):
        raise ModelError("malformed key", where=where, expected="a list or an object", found=type(more).__name__)
    items = more.values() if isinstance(more, dict) else more
    return [added_token(item, True, where).text for item in items]


def _decoder_rows(rows: object) -> Iterator[tuple[int, AddedToken]]:
    """Ids and tokens of added_tokens_decoder."""
    where = "tokenizer_config.json, key added_tokens_decoder"
    if not isinstance(rows, dict):
        raise ModelError("malformed key", where=where, expected="an object", found=type(rows).__name__)
    for key, item in rows.items():
        index = int(key) if key.isascii() and key.isdecimal() and len(key) <= 10 else key
        yield checked_id(index, where), added_token(item, False, f"{where}, id {key[:20]}")


def _is_same(old: Token | None, new: AddedToken) -> bool:
    kind = TokenType.CONTROL if new.special else TokenType.USER_DEFINED
    return old is not None and (old.text, old.type, old.lstrip, old.rstrip) == (new.text, kind, new.lstrip, new.rstrip)


def _special_flags(files: Mapping[str, Path]) -> dict[str, AddedToken]:
    special = _read_json(files, "special_tokens_map.json")
    more = special.get("additional_special_tokens") or []
    where = "special_tokens_map.json"
    if not isinstance(more, list):
        key = f"{where}, key additional_special_tokens"
        raise ModelError("malformed key", where=key, expected="a list or null", found=type(more).__name__)
    items = [special[name] for name in NAMES if special.get(name) not in (None, "")] + more
    tokens = (replace(added_token(item, True, where), special=True) for item in items)
    return {token.text: token for token in tokens}


def _frame(
    vocabulary: Vocabulary, settings: Json, names: Mapping[str, str], where: str
) -> tuple[str | None, str | None]:
    """The special token put before each text, and the one put after it."""
    if where == "tokenizer.model":
        bos = names.get("bos_token") if settings.get("add_bos_token") else None
        eos = names.get("eos_token") if settings.get("add_eos_token") else None
        return bos, eos
    prefix, suffix = vocabulary.prefix, vocabulary.suffix
    if len(prefix) > 1 or len(suffix) > 1:
        raise ModelError(
            "the tokenizer puts several special tokens around a text",
            where=where,
            expected="at most one before and one after",
            found=f"{' '.join(prefix)} … {' '.join(suffix)}",
        )
    return next(iter(prefix), None), next(iter(suffix), None)


def _chat_template(files: Mapping[str, Path], settings: Json) -> str | None:
    if "chat_template.jinja" in files:
        try:
            return read_small(files["chat_template.jinja"], _MAX_TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise ModelError("the chat template is not UTF-8", where="chat_template.jinja", found=str(error)) from error
    template = settings.get("chat_template")
    if isinstance(template, list) and all(
        isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
        for item in template
    ):
        template = {item["name"]: item["template"] for item in template}.get("default")
    if template is None or isinstance(template, str):
        return template
    raise ModelError(
        "malformed chat template",
        where="tokenizer_config.json, key chat_template",
        expected="a text, or a list of objects with name and template",
        found=type(template).__name__,
    )


def _check_special_ids(tokenizer: Tokenizer, where: str) -> None:
    size = len(tokenizer.tokens)
    if not tokenizer.eos_ids:
        raise ModelError(
            "the model has no end-of-sequence token",
            where=where,
            mend="Set eos_token_id in generation_config.json or config.json, or eos_token in tokenizer_config.json.",
        )
    for name, ids in (("bos", (tokenizer.bos_id,)), ("eos", tokenizer.eos_ids), ("pad", (tokenizer.pad_id,))):
        for index in ids:
            if index is not None and not 0 <= index < size:
                raise ModelError(
                    f"the {name} token id is outside the vocabulary",
                    where="generation_config.json or config.json",
                    expected=f"an id below {size}",
                    found=str(index),
                )
