"""Generated texts that tell tokenizers apart: the token gate encodes and decodes each of them in every runtime.

The texts of `tundish.corpus` are what people write; these are what programs and other systems write: words of scripts
of all planes joined by every kind of white space, line ends after everything, control characters, and each of the
tokenizer's added tokens in every surrounding that its flags can change. They depend on the tokenizer alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from converters.tokenizer import Tokenizer, TokenType
from tundish.corpus import TOKEN_CORPUS

GENERATED = 1600  # texts besides those of added tokens and of pairs
ADDED = frozenset((TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN))
_SEED = 12
# A word or two of each script: with case and without, in either direction, with marks, of planes 0 to 3 and 14 to 16.
WORDS: tuple[str, ...] = (
    "south", "The", "HTTP", "naïve", "Straße", "œuvre", "don't", "I'LL", "e\u0301t\u00e9", "Ångström", "ĲSSEL",
    "ǅungla", "İstanbul", "ﬁne", "ｗｉｄｅ", "Việt", "ᵃᵇ", "Αθήνα", "ὀδύσσεια", "Москва", "ещё", "ѣ", "Ⰰⰱ",
    "Երևան", "שָׁלוֹם", "العربية", "لا", "ܫܠܡܐ", "ދިވެހި", "ߒߞߏ", "हिन्दी", "क्ष", "বাংলা", "ਪੰਜਾਬੀ", "ગુજરાતી",
    "ଓଡ଼ିଆ", "தமிழ்", "తెలుగు", "ಕನ್ನಡ", "മലയാളം", "සිංහල", "ไทย", "ทำ", "ລາວ", "བོད་", "မြန်မာ", "ქართული",
    "ᲐᲑ", "한국어", "\u1112\u1161\u11ab", "አማርኛ", "ᏣᎳᎩ", "ꭰꭱ", "ᐃᓄᒃ", "ᚠᚢ", "ខ្មែរ", "ᠮᠣᠩᠭᠣᠯ", "ⵜⵉⴼ", "ⲁⲃ",
    "かな", "カタカナ", "ｶﾅ", "漢字", "ㄅㄆ", "ꦗꦮ", "ᮞᮥ", "꧋", "𐎀𐎁", "𐌰𐌱", "𐐀𐐨", "𐤀𐤁", "𐬀", "𑀓", "𒀀𒁀", "𓀀", "𖤀",
    "𝒜𝔟", "𝟙𝟚", "𞤀𞤢", "𞸀", "𠀀𪛖", "𰀀", "🀄", "🙂", "👩‍💻", "🇫🇷", "👍🏽", "❤️", "1️⃣", "x\u0323\u0301",
    "\U000e0041", "\U000f0000", "\U0010fffd", "\ufffd", "\ufeff", "\u200b", "\u200d", "\u00ad", "\u2060",
    "\u202e", "7", "42", "2024", "١٢٣", "१२", "½", "²", "Ⅷ", "①", "𝟜", "3.14", "1,000", "a1b2", "snake_case",
    "camelCase", "\u2581", "▁▁x", "Ġ", "Ċ", "Ã©", "<0x0A>", "<0xE2>",
)  # fmt: skip
MARKS: tuple[str, ...] = (
    ".", ",", "!", "?", ";", ":", ")", "(", "]", "}", '"', "'", "“", "”", "’", "—", "…", "-", "--", "/", "\\",
    "*", "#", "$", "%", "&", "@", "_", "`", "~", "^", "+", "=", "|", "<", ">", "。", "、", "「", "،", "؟", "।",
    "·", "€", "©", "→", "∑", " .", " ,", " !", " ?", " 's", " n't", " 'm", " 're", "...", "?!", "//", "/*",
    "};", "===",
)  # fmt: skip
BLANKS: tuple[str, ...] = (
    " ", "  ", "   ", "     ", " ", "\t", "\t\t", " \t", "\t ", "\u00a0", "\u0085", "\u1680", "\u180e",
    "\u2000", "\u2002", "\u2003", "\u2009", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000",
    " \u00a0", "\u00a0 ", "\u2003\u2003", " \u3000 ", "\x0b", "\x0c", "\x1c", "\x1f",
)  # fmt: skip
ENDS: tuple[str, ...] = (
    "\n", "\r\n", "\r", "\n\n", "\r\n\r\n", "\r\r", "\n\n\n", "\n\r", " \n", "\n ", " \r\n", "\r\n ", "\r\n\t",
    "\n  \n", "\r\n  \r\n", "\t\n", "\n\t\t", "\u2028\n", "\u0085\n",
)  # fmt: skip
CONTROLS: tuple[str, ...] = ("\0", "\0\0", "\x01", "\x08", "\x1b[0m", "\x7f", "\x80", "\x9f", "\ufffe", "\ufdd0")


def generated_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Each text once, the same ones for the same tokenizer: what people write, all pairs, mixtures, added tokens."""
    added = [token.text for token in tokenizer.tokens if token.type in ADDED and token.text]
    texts = [*TOKEN_CORPUS, *_pairs(), *_mixtures(added)]
    for text in added:
        texts += probes(text)
    return tuple(dict.fromkeys(texts))


def probes(token: str) -> tuple[str, ...]:
    """A token alone, within a word (single_word), with white space and line ends on either side (lstrip, rstrip), at
    both ends of a text, twice, and in other letters (normalized)."""
    return (
        token,
        f"in{token}side",
        f"one {token} two",
        f"one  {token}  two",
        f"{token}one {token}two{token} three\n{token}\n",
        f" {token} ",
        f"a\n{token}\nb",
        f"a.\r\n{token}\r\n b",
        f"\t{token}\u00a0x\u3000{token}{token}",
        f"7{token}_é{token}é, {token.swapcase()}",
    )


def _pairs() -> Iterator[str]:
    """Every white space and line end between words, after punctuation, at the start and at the end."""
    for blank in (*BLANKS, *ENDS):
        yield from (blank, f"{blank}x", f"x{blank}", f"south,{blank}the end.{blank}")
        yield from (f"end.{blank}Next", f"1{blank}2", f"漢{blank}字", f"({blank})", f"é{blank}{blank}é")
    for control in CONTROLS:
        yield from (control, f"a{control}b", f"a {control} b{control}", f"{control}x.\n{control}\n")
    for word in WORDS:
        yield from (word, f" {word}", f"{word} {word}.", f"{word}\r\n{word}")


def _mixtures(added: list[str]) -> Iterator[str]:
    dice = random.Random(_SEED)  # noqa: S311 - reproducible, nothing secret

    def one_of(parts: tuple[str, ...] | list[str]) -> str:
        return parts[int(dice.random() * len(parts))]

    for index in range(GENERATED):
        text = ""
        for _ in range(2 + index % 7):
            text += one_of(WORDS)
            if dice.random() < 0.3:
                text += one_of(MARKS)
            if added and dice.random() < 0.08:
                text += one_of(added)
            if dice.random() < 0.03:
                text += one_of(CONTROLS)
            chance = dice.random()
            text += " " if chance < 0.4 else one_of(BLANKS) if chance < 0.65 else one_of(ENDS) if chance < 0.9 else ""
        yield text
