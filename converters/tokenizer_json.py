"""tokenizer.json for containers that need one, made where the checkpoint has only SentencePiece's tokenizer.model."""

from __future__ import annotations

import json

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from converters.errors import ModelError
from converters.fast_tokenizer import SPACE
from converters.tokenizer import SpacePrefix, Token, Tokenizer, TokenizerKind, TokenType
from converters.vocabulary import is_filler

_MEND = "Fetch the tokenizer files of the model again."
ADDED = frozenset((TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN))


def fast_tokenizer(tokenizer: Tokenizer) -> FastTokenizer:
    """The tokenizers library's own, for encoding. ModelError if it refuses the file."""
    try:
        found = FastTokenizer.from_str(ensure_tokenizer_json(tokenizer))
        found.no_padding()  # which transformers does neither unless it is asked to
        found.no_truncation()
    except BaseException as error:  # a panic of its Rust code is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            "the tokenizers library cannot read this tokenizer",
            where="tokenizer.json",
            found=str(error)[:300],
            mend=_MEND,
        ) from error
    if not isinstance(found.model, BPE):  # without a type, it takes what is no sound BPE for a list of words
        raise ModelError("the tokenizer's model is damaged", where="tokenizer.json", expected="BPE", mend=_MEND)
    unknown = found.model.unk_token
    if unknown is not None and found.model.token_to_id(unknown) is None and not _has_all_bytes(found.model):
        expected, what = f"{unknown!r} in the vocabulary", "the tokenizer has no token for what it does not know"
        raise ModelError(what, where="tokenizer.json", expected=expected, mend=_MEND)
    return found


def _has_all_bytes(model: BPE) -> bool:
    """Whether every text can be spelled, so that nothing is unknown: by letters for bytes, as byte-level BPE has."""
    return all(model.token_to_id(letter) is not None for letter in ByteLevel.alphabet())


def ensure_tokenizer_json(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer.json: the checkpoint's own if transformers takes it as it is, otherwise one that encodes
    as transformers does."""
    if tokenizer.kind is TokenizerKind.BYTE_LEVEL_BPE or (tokenizer.merges and not tokenizer.remade):
        text = tokenizer.files["tokenizer.json"].read_text(encoding="utf-8")
        return _with_added(text, tokenizer)
    return json.dumps(_built(tokenizer), ensure_ascii=False, indent=1) + "\n"


def _with_added(text: str, tokenizer: Tokenizer) -> str:
    """The same file, with the tokens that the files beside it add, and the flags that they give."""
    document = json.loads(text)
    added = {item["id"]: item for item in document.get("added_tokens", [])}
    ours = {
        index: _added_token(index, token)
        for index, token in enumerate(tokenizer.tokens)
        if token.type in (TokenType.CONTROL, TokenType.USER_DEFINED)
    }
    if all(added.get(index) == item for index, item in ours.items()):
        return text
    merged = sorted((added | ours).items())
    return json.dumps(document | {"added_tokens": [item for _, item in merged]}, ensure_ascii=False, indent=1) + "\n"


def _built(tokenizer: Tokenizer) -> dict[str, object]:
    """The layout that transformers' own conversions have (LlamaTokenizer, convert_slow_tokenizer), from the record."""
    tokens = {index: token for index, token in enumerate(tokenizer.tokens) if not is_filler(index, token)}
    prefix = tokenizer.space_prefix
    unknown = [token.text for token in tokens.values() if token.type is TokenType.UNKNOWN]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(index, token) for index, token in tokens.items() if token.type in ADDED],
        "normalizer": None if tokenizer.metaspace else _normalizer(prefix),
        "pre_tokenizer": _metaspace(prefix) if tokenizer.metaspace else None,
        "post_processor": _frame(tokenizer),
        "decoder": _decoder(prefix),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown[0] if unknown else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token.text: index for index, token in tokens.items()},
            "merges": [list(pair) for pair in tokenizer.merges or merges_of_scores(list(tokens.values()))],
        },
    }


def merges_of_scores(tokens: list[Token]) -> list[tuple[str, str]]:
    """All pairs that make a token, the highest score first: SentencePiece joins any two pieces that form a piece."""
    texts = {token.text for token in tokens}
    pairs = [
        (-token.score, index, token.text[:cut], token.text[cut:])
        for index, token in enumerate(tokens)
        if token.type is TokenType.NORMAL
        for cut in range(1, len(token.text))
        if token.text[:cut] in texts and token.text[cut:] in texts
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _added_token(index: int, token: Token) -> dict[str, object]:
    return {
        "id": index,
        "content": token.text,
        "single_word": token.single_word,
        "lstrip": token.lstrip,
        "rstrip": token.rstrip,
        "normalized": token.normalized,
        "special": token.type is not TokenType.USER_DEFINED,
    }


def _normalizer(prefix: SpacePrefix) -> dict[str, object]:
    replace: dict[str, object] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if prefix is SpacePrefix.NEVER:
        return replace
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}


def _metaspace(prefix: SpacePrefix) -> dict[str, object]:
    scheme = {SpacePrefix.ALWAYS: "always", SpacePrefix.FIRST: "first", SpacePrefix.NEVER: "never"}[prefix]
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


def _decoder(prefix: SpacePrefix) -> dict[str, object]:
    steps: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix is not SpacePrefix.NEVER:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _frame(tokenizer: Tokenizer) -> dict[str, object] | None:
    """BOS and EOS around a text, and around each text of a pair."""
    before = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_ids[0]] if tokenizer.add_eos else []
    if not before and not after:
        return None

    def sequence(name: str, kind: int) -> list[object]:
        special = [
            [{"SpecialToken": {"id": tokenizer.tokens[index].text, "type_id": kind}} for index in ids]
            for ids in (before, after)
        ]
        return [*special[0], {"Sequence": {"id": name, "type_id": kind}}, *special[1]]

    names = {index: tokenizer.tokens[index].text for index in (*before, *after)}
    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [index], "tokens": [text]} for index, text in names.items()},
    }
