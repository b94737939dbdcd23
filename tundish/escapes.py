"""Strangers' text where it might mean something: names, descriptions and answers of models in Markdown, on a terminal
and in lines of JSON."""

from __future__ import annotations

import html
import json
import re
import unicodedata

# What begins a heading, a list, a rule or code, and what makes emphasis, links, images, tables and formulas. An
# underscore within a word is only that.
_MARKUP = re.compile(r"[\\`*\[\]#|~$]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/(?=/)|(?<=www)\.")
_BEGINNING = re.compile(r"^(\d*)([-+=.)])(?=[-+=\s]|$)")


def markdown(text: str) -> str:
    """Text as Markdown that shows it, in a line, and means nothing else: no markup, no HTML, no link.

    https://github.github.com/gfm/
    """
    line = html.escape(in_a_line(text), quote=False)
    return _BEGINNING.sub(r"\1\\\2", _MARKUP.sub(r"\\\g<0>", line))


def in_a_line(text: str) -> str:
    """The text in one line, without what no terminal shows."""
    return terminal(" ".join(text.split()))


def terminal(text: str) -> str:
    """The text for a terminal: what would move its cursor, colour, rename or reorder is shown as a sign for it."""
    return "".join(char if _shows(char) or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def json_line(document: object, indent: int | None = None) -> str:
    """The document in JSON, for programs, which a terminal may show as well. ValueError for what JSON cannot spell."""
    text = json.dumps(document, indent=indent, ensure_ascii=False, allow_nan=False)
    return "".join(char if _shows(char) or char == "\n" else json.dumps(char)[1:-1] for char in text)


def _shows(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"
