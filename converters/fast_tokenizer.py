"""tokenizer.json, the file of Hugging Face's `tokenizers` library, read into a Vocabulary.

Supported are the two families that language models of the llama and phi lines use: byte-level BPE, and the
SentencePiece look-alike (BPE with byte fallback whose spaces are U+2581). All else is refused by name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from converters.errors import ModelError
from converters.json_file import read_json
from converters.vocabulary import (
    SpacePrefix,
    Token,
    TokenizerKind,
    TokenType,
    Vocabulary,
    added_token,
    checked_id,
    with_added,
)

SPACE = "\u2581"
MAX_SPLITS = 64  # the most that a published tokenizer has are five
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# The split of tokenizers' ByteLevel with use_regex (src/pre_tokenizers/byte_level.rs): GPT-2's.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What transformers 5 writes to undo that Metaspace puts no space before a text that begins with one.
FIRST_SPACE_TWICE = {"type": "Replace", "pattern": {"Regex": rf"\A{SPACE}"}, "content": SPACE * 2}
Json = dict[str, Any]  # parsed JSON of a foreign format: each field is checked where it is used


def read_fast_tokenizer(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json. Raises ModelError if it is damaged or of an unsupported kind."""
    try:
        return _vocabulary(read_json(path), path.name)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            "the tokenizer file cannot be read",
            where=path.name,
            found=f"{type(error).__name__}: {error}",
            mend="It is damaged or not a file of the tokenizers library (a Git LFS pointer, perhaps): fetch it again.",
        ) from error


def unsupported(what: str, found: str, where: str) -> ModelError:
    return ModelError(
        f"the tokenizer's {what} is not supported",
        where=where,
        expected="byte-level BPE, or BPE with byte fallback as SentencePiece makes it",
        found=found,
    )


def _vocabulary(root: Json, where: str) -> Vocabulary:
    model: Json = root["model"]
    # Very old files have no type, and only BPE has merges.
    if model.get("type", "BPE" if "merges" in model else None) != "BPE":
        raise unsupported("model", str(model.get("type")), where)
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise unsupported(f"BPE option {option}", repr(model[option]), where)
    pre_tokenizers = _flat(root.get("pre_tokenizer"), "pretokenizers")
    normalizers = _flat(root.get("normalizer"), "normalizers")
    merges = tuple(_merge(merge, where) for merge in model["merges"])
    prefix, suffix = _affixes(root.get("post_processor"), where)
    if any(step["type"] == "ByteLevel" for step in pre_tokenizers):
        kind = TokenizerKind.BYTE_LEVEL_BPE
        if normalizers:
            raise unsupported("normalizer", normalizers[0]["type"], where)
        patterns, space_prefix = _splits(pre_tokenizers, where)
        metaspace = False
    elif model.get("byte_fallback"):
        kind = TokenizerKind.SENTENCEPIECE
        patterns = ()
        space_prefix, metaspace = _space_prefix(normalizers, pre_tokenizers, model["vocab"], where)
    else:
        names = ", ".join(step["type"] for step in pre_tokenizers) or "none"
        raise unsupported("pre-tokenizer", f"{names}, and no byte fallback", where)
    tokens = _tokens(model, kind, merges, where)
    _check_merges(merges, model["vocab"], where)
    added = {
        checked_id(item["id"], f"{where}, added_tokens"): added_token(item, False, f"{where}, added_tokens")
        for item in root.get("added_tokens", [])
    }
    return Vocabulary(
        kind=kind,
        tokens=with_added(tokens, added, where),
        merges=merges,
        split_patterns=patterns,
        ignore_merges=bool(model.get("ignore_merges")),
        space_prefix=space_prefix,
        metaspace=metaspace,
        prefix=prefix,
        suffix=suffix,
    )


def _flat(step: Json | None, children: str) -> list[Json]:
    """Steps of a nested Sequence, in order."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [leaf for child in step[children] for leaf in _flat(child, children)]


def _merge(merge: str | list[str], where: str) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise ModelError("a BPE merge is not a pair", where=where, found=repr(merge))
    return parts[0], parts[1]


def _check_merges(merges: tuple[tuple[str, str], ...], vocab: Json, where: str) -> None:
    """The tokenizers library refuses merges of what is no token, too."""
    if not vocab or not merges:
        raise ModelError("the tokenizer has no vocabulary or no merges", where=where, mend="Fetch the file again.")
    for left, right in merges:
        missing = [text for text in (left, right, left + right) if text not in vocab]
        if missing:
            raise ModelError(
                "a BPE merge names a text that is no token",
                where=where,
                expected=f"{missing[0]!r} in the vocabulary",
                found=f"a merge of {left!r} and {right!r}",
                mend="Fetch the file again.",
            )


def _tokens(model: Json, kind: TokenizerKind, merges: tuple[tuple[str, str], ...], where: str) -> dict[int, Token]:
    sentencepiece = kind is TokenizerKind.SENTENCEPIECE
    scores = scores_of_merges(merges) if sentencepiece else {}
    lowest = -float(len(merges))
    tokens: dict[int, Token] = {}
    for text, index in model["vocab"].items():
        checked_id(index, f"{where}, token {text!r}")
        if index in tokens:
            raise ModelError(
                "two tokens have the same id", where=where, found=f"{tokens[index].text!r} and {text!r} with id {index}"
            )
        if sentencepiece and text == model.get("unk_token"):
            tokens[index] = Token(text, TokenType.UNKNOWN)
        elif sentencepiece and BYTE_TOKEN.fullmatch(text):
            tokens[index] = Token(text, TokenType.BYTE)
        else:
            tokens[index] = Token(text, TokenType.NORMAL, scores.get(text, lowest) if sentencepiece else 0.0)
    return tokens


def scores_of_merges(merges: tuple[tuple[str, str], ...]) -> dict[str, float]:
    """Scores that make "highest score first" the same order as "lowest merge first".

    A token that several merges make counts by the first of them, as SentencePiece knows no pairs, only results.
    """
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))
    return scores


def _splits(steps: list[Json], where: str) -> tuple[tuple[str, ...], SpacePrefix]:
    """Byte-level BPE's pre-tokenizer as regexes applied one after another; matches and the gaps between are pieces."""
    patterns: list[str] = []
    space_prefix = SpacePrefix.NEVER
    for step in steps:
        match step["type"]:
            case "Digits":
                patterns.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
            case "Split":
                # "Removed" with invert drops the gaps instead of keeping them: the same where a pattern leaves none.
                if (step["behavior"], step.get("invert", False)) not in {("Isolated", False), ("Removed", True)}:
                    raise unsupported("split", f"{step['behavior']}, invert {step.get('invert')}", where)
                pattern = step["pattern"]
                regex = pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
                if not isinstance(regex, str):
                    raise TypeError("a regex that is no text")
                patterns.append(regex)
            case "ByteLevel":
                if step.get("use_regex", True):
                    patterns.append(GPT2_PATTERN)
                if step["add_prefix_space"]:
                    space_prefix = SpacePrefix.ALWAYS
            case other:
                raise unsupported("pre-tokenizer", other, where)
    if len(patterns) > MAX_SPLITS:
        raise unsupported("pre-tokenizer", f"{len(patterns):,} splits, more than {MAX_SPLITS}", where)
    return tuple(patterns), space_prefix


def _space_prefix(
    normalizers: list[Json], pre_tokenizers: list[Json], vocab: Json, where: str
) -> tuple[SpacePrefix, bool]:
    """Where a SentencePiece look-alike puts its extra space, and whether it leaves it out before what begins with one.
    Refuses any other change of the text."""
    prefix, replaces, doubles = SpacePrefix.NEVER, False, False
    for step in normalizers:
        if step["type"] == "Prepend" and step["prepend"] in (SPACE, " "):
            prefix = SpacePrefix.ALWAYS
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            replaces = True
        elif step == FIRST_SPACE_TWICE and replaces and any(each["type"] == "Metaspace" for each in pre_tokenizers):
            doubles = True
        else:
            raise unsupported("normalizer", json.dumps(step, ensure_ascii=False), where)
    prepends, metaspace = prefix is SpacePrefix.ALWAYS, False
    for step in pre_tokenizers:
        if step["type"] != "Metaspace" or step["replacement"] != SPACE:
            raise unsupported("pre-tokenizer", step["type"], where)
        # Cutting in front of each space changes nothing unless a token holds a space further in.
        if step.get("split", True) and any(SPACE in text[1:] for text in vocab):
            raise unsupported("pre-tokenizer", "Metaspace with split, and tokens that have a space inside", where)
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        if doubles and scheme != "always":
            raise unsupported("normalizer", f"a first space twice, and Metaspace {scheme}", where)
        replaces = True
        if not prepends:  # else it finds a space in front already
            prefix = {"always": SpacePrefix.ALWAYS, "first": SpacePrefix.FIRST, "never": SpacePrefix.NEVER}[scheme]
            metaspace = not doubles
    if not replaces:
        raise unsupported("normalizer", f"spaces that do not become {SPACE}", where)
    return prefix, metaspace


def _affixes(processor: Json | None, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The special tokens that the post-processor puts before and after a single text."""
    for step in _flat(processor, "processors"):
        if step["type"] == "TemplateProcessing":
            names = [part.get("SpecialToken", {}).get("id") for part in step["single"]]
            middle = names.index(None)
            if not all(isinstance(name, str) for name in (*names[:middle], *names[middle + 1 :])):
                raise unsupported("post-processor", "a template whose special tokens have no name", where)
            return tuple(names[:middle]), tuple(names[middle + 1 :])
        if step["type"] != "ByteLevel":
            raise unsupported("post-processor", step["type"], where)
    return (), ()
