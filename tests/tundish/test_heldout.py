"""The held-out text is what published figures were measured on, and is kept apart from what calibration may use."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pydoc_data import topics

from tundish.heldout import evaluation_text

RUN = 8  # words; two texts that share no run of so many words share no sentence


def test_the_text_is_the_one_that_figures_were_measured_on() -> None:
    # Changing the text is allowed; every figure in the documentation has then to be measured again.
    digest = hashlib.sha256("\n%\n".join(evaluation_text()).encode()).hexdigest()
    assert digest == "36d0421c53e42bb1564265d288923c25d636ad05621a0531161e56a0663bf898"


def test_passages_are_many_distinct_and_clean() -> None:
    passages = evaluation_text()
    assert len(passages) == len(set(passages)) >= 25
    assert sum(len(passage.encode()) for passage in passages) > 20_000
    for passage in passages:
        assert passage == passage.strip()
        assert unicodedata.is_normalized("NFC", passage)
        assert not any(line.endswith(" ") for line in passage.splitlines())


def test_most_is_english_and_some_is_not() -> None:
    letters = [character for passage in evaluation_text() for character in passage if character.isalpha()]
    foreign = sum(not character.isascii() for character in letters)
    assert 0.01 < foreign / len(letters) < 0.1


def test_nothing_is_shared_with_the_text_left_for_calibration() -> None:
    held_out, calibration = _runs("\n".join(evaluation_text())), _runs("\n".join(topics.topics.values()))
    assert len(held_out) > 3000 and len(calibration) > 30_000
    assert not held_out & calibration


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)}
