"""Which of llama.cpp's pre-tokenizers cuts text as the model's own does.

llama.cpp cannot hold a regex in the file: `tokenizer.ggml.pre` names one of those compiled in, and a wrong name gives
other tokens without a word. So the choice is made by behaviour: both sets of regexes cut the same probes, and only a
name whose pieces are all equal is taken.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from tokenizers import Regex, models
from tokenizers.pre_tokenizers import PreTokenizer, Sequence, Split

from converters.errors import ModelError
from converters.tokenizer import Tokenizer, TokenType

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 = rf"{WORDS}|\p{{N}}{{1,3}}|{PUNCTUATION}|{SPACES}"
QWEN2 = rf"{WORDS}|\p{{N}}|{PUNCTUATION}|{SPACES}"

QWEN35_WORDS = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+"
QWEN35 = rf"{QWEN35_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}"


def _cased(upper: str, lower: str, suffix: str, digits: str) -> str:
    """The line of regexes that end words where capitals begin: tekken and o200k."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"


UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ASCII_UPPER, ASCII_LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
MARK_UPPER, MARK_LOWER = r"((?=[\p{L}\p{M}])([^a-z]))", r"((?=[\p{L}\p{M}])([^A-Z]))"
O200K = _cased(UPPER, LOWER, rf"{CONTRACTIONS}?", r"\p{N}{1,3}")
CASE = "words in capitals that mix ASCII and other letters (ÉCOLE, GRÖSSE) are cut differently"
CASE_AND_MARKS = f"{CASE}, and so are words with combining marks (Devanagari, Thai, vocalized Arabic and Hebrew)"


@dataclass(frozen=True, slots=True)
class PreTokenizerRow:
    """One pre-tokenizer of llama.cpp.

    `patterns` are its regexes, applied one after another. Where llama.cpp only approximates the model's regex,
    `stands_for` is that regex, and `difference` says what comes of it. `cleans`: its llama_detokenize takes spaces out
    before punctuation.
    """

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    stands_for: tuple[str, ...] | None = None
    difference: str | None = None
    cleans: bool = False


# llama.cpp, src/llama-vocab.cpp: the regexes in llm_tokenizer_bpe's constructor, the flags in llama_vocab::impl::load.
# Read at commit 00ad355e of ggml-org/llama.cpp; granite-embed-multi-97m and what follows need a build of 2026.
# Where several names mean the same, the oldest one that fits is listed. Exact rows go before approximate ones.
ROWS = (
    PreTokenizerRow("gpt-2", (GPT2,), cleans=True),
    PreTokenizerRow("smollm", (r"\p{N}", GPT2)),
    PreTokenizerRow("llama-bpe", (LLAMA3,), ignore_merges=True, cleans=True),
    PreTokenizerRow("dbrx", (LLAMA3,), cleans=True),
    PreTokenizerRow("qwen2", (QWEN2,)),
    PreTokenizerRow("qwen35", (QWEN35,)),
    PreTokenizerRow("seed-coder", (rf"{WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}",)),
    PreTokenizerRow(
        "minicpm5", (r"\p{N}{1,3}", rf"{WORDS}|\p{{N}}+|{PUNCTUATION}|{SPACES}"), ignore_merges=True, cleans=True
    ),
    PreTokenizerRow(
        "tekken",
        (_cased(ASCII_UPPER, ASCII_LOWER, "", r"\p{N}"),),
        ignore_merges=True,
        stands_for=(_cased(UPPER, LOWER, "", r"\p{N}"),),
        difference=CASE_AND_MARKS,
    ),
    # Both stand for o200k. The first one is nearer to it, the second is known to builds since February 2025.
    PreTokenizerRow(
        "granite-embed-multi-97m",
        (_cased(MARK_UPPER, MARK_LOWER, rf"{CONTRACTIONS}?", r"\p{N}{1,3}"),),
        ignore_merges=True,
        stands_for=(O200K,),
        difference=CASE,
    ),
    PreTokenizerRow(
        "gpt-4o",
        (_cased(ASCII_UPPER, ASCII_LOWER, rf"{CONTRACTIONS}?", r"\p{N}{1,3}"),),
        stands_for=(O200K,),
        difference=CASE_AND_MARKS,
    ),
)

# Characters that the regexes tell apart: letters of contractions, letters with and without case, marks, digits and
# other numbers, white space, punctuation, symbols. Left out: the long s, which (?i:'s) matches in some engines.
PROBE_ALPHABET = (
    "asStTlLeEdDrRvVmMéÉßяЯǅʰªא中あ가\u0301\u093f\u0e3112٣½Ⅷ²    \t\n\n\r\u00a0\u3000''’.,!/_-$+<(\"🙂→\u200d\x01"
)
PROBE_COUNT, PROBE_LENGTH = 400, 48


def identify_pre(tokenizer: Tokenizer) -> PreTokenizerRow:
    """The pre-tokenizer of llama.cpp that cuts text as a byte-level BPE's own does; exact ones go first.

    Where a word of the vocabulary comes out of the merges as itself, it does not matter whether ignore_merges is set.
    Raises ModelError if there is none, or if the only ones that fit treat the merges differently.
    """
    own = splits(tokenizer.split_patterns)
    exact = [row for row in ROWS if splits(row.patterns) == own]
    near = [row for row in ROWS if row.stands_for is not None and splits(row.stands_for) == own]
    exact.sort(key=lambda row: row.ignore_merges != tokenizer.ignore_merges)
    for row in exact + near:
        if row.ignore_merges == tokenizer.ignore_merges or merges_make_every_token(tokenizer):
            return row
    found = ", then ".join(tokenizer.split_patterns) or "none"
    if exact or near:
        found = f"such a split, but ignore_merges {str(tokenizer.ignore_merges).lower()}"
    raise ModelError(
        "llama.cpp has no pre-tokenizer that cuts text as this model's tokenizer does",
        where="pre_tokenizer in tokenizer.json",
        expected=f"the behaviour of one of {', '.join(row.name for row in exact + near or ROWS)}",
        found=found,
        mend="Leave gguf out of the recipe's targets, or add the row to exporters/gguf/pretokenizer.py if a newer "
        "llama.cpp has it.",
    )


@cache
def splits(patterns: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The pieces of each probe."""
    return tuple(pieces(patterns, probe) for probe in _probes())


def pieces(patterns: tuple[str, ...], text: str) -> tuple[str, ...]:
    """Text cut by regexes one after another: matches are pieces, and so is what lies between them."""
    return tuple(piece for piece, _ in _splitter(patterns).pre_tokenize_str(text))


@cache
def _splitter(patterns: tuple[str, ...]) -> PreTokenizer:
    return Sequence([Split(_regex(pattern), "isolated") for pattern in patterns])


def _regex(pattern: str) -> Regex:
    try:
        return Regex(pattern)
    except Exception as error:  # the library raises the bare class
        raise ModelError(
            "a regex of the tokenizer is invalid",
            where="pre_tokenizer in tokenizer.json",
            found=f"{pattern!r}: {error}",
            mend="The file is damaged: fetch it again.",
        ) from error


@cache
def _probes() -> tuple[str, ...]:
    source = random.Random(0)  # noqa: S311 - reproducible, nothing secret
    return tuple("".join(source.choices(PROBE_ALPHABET, k=PROBE_LENGTH)) for _ in range(PROBE_COUNT))


def merges_make_every_token(tokenizer: Tokenizer) -> bool:
    """Whether each word of the vocabulary comes out of the merges as one token: then ignore_merges changes nothing."""
    # All tokens, also added ones: merges may name them.
    model = models.BPE({token.text: index for index, token in enumerate(tokenizer.tokens)}, list(tokenizer.merges))
    words = (token.text for token in tokenizer.tokens if token.type is TokenType.NORMAL)
    return all(len(model.tokenize(word)) == 1 for word in words)
