"""The held-out text: what divergence from the reference is measured on, and nothing else.

It is shipped, not taken from the Python library or the net: figures can be compared only if everybody measures on the
same text, and Python's own prose (`pydoc_data.topics`) differs between Python versions. It was written for this purpose
and lies under the project's licence, so no model, and no quantizer's calibration, has seen it before it was published
here. Whoever calibrates takes other text: `pydoc_data.topics` shares none with this one, which a test checks, and
`calibration_text` refuses text that does.

The passages change register often (tales, explanations, talk, instructions, minutes, code, tables, sums), since a
recipe takes as many tokens from the beginning as it can afford. Passages in other languages come last.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files

from converters.errors import UsageError

SEPARATOR = "\n%\n"
_RUN = 16  # words in a row that no other text has by chance


def evaluation_text() -> list[str]:
    """The passages, in a fixed order: 24 KB, mostly English, about 6,000 tokens."""
    text = files("tundish").joinpath("data", "heldout.txt").read_text(encoding="utf-8")
    return text.rstrip("\n").split(SEPARATOR)


def require_not_held_out(text: str, where: str) -> None:
    """UsageError for calibration text that has a run of this text's words in it, whatever their case and spaces."""
    if any(run in _held_out_runs() for run in _runs(text)):
        raise UsageError(
            "the calibration text has text in it that is held out, for the measurements of verification",
            where=where,
            mend="Take other text.",
        )


@cache
def _held_out_runs() -> frozenset[tuple[str, ...]]:
    return frozenset(_runs("\n".join(evaluation_text())))


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return (tuple(words[start : start + _RUN]) for start in range(len(words) - _RUN + 1))
