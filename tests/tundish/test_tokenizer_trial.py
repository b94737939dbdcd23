"""A tokenizer that would hang, panic or swell does so in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.errors import ModelError
from converters.tokenizer import read_tokenizer
from converters.tokenizer_json import fast_tokenizer
from tests.converters.tiny_tokenizers import LLAMA3, write_byte_level
from tundish import tokenizer_trial
from tundish.tokenizer_trial import try_tokenizer

Change = Callable[[dict[str, Any]], object]


def tried(folder: Path, change: Change, seconds: float = 20.0, memory: int = tokenizer_trial.MEMORY) -> None:
    model = write_byte_level(folder, LLAMA3)
    path = folder / "tokenizer.json"
    root = json.loads(path.read_text())
    change(root)
    path.write_text(json.dumps(root))
    try_tokenizer(folder, read_tokenizer(folder, model), seconds, memory)


def split_by(regex: str, count: int = 1) -> Change:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return lambda root: root["pre_tokenizer"].update(
        pretokenizers=[split] * count + root["pre_tokenizer"]["pretokenizers"]
    )


def padded_to(length: int) -> Change:
    padding: dict[str, Any] = {"strategy": {"Fixed": length}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    return lambda root: root.update(padding=padding)


def test_a_sound_tokenizer_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried(tmp_path / "a", lambda root: None)
    monkeypatch.setattr(tokenizer_trial, "run_child", None)  # which nobody calls again
    tried(tmp_path / "b", lambda root: None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (split_by(r"(?:a|a|aa)+(?!a|!)b"), "time limit of 2 s|retry-limit|panic|Panic"),
        (split_by("("), "the tokenizers library|Exception|Panic"),
        (lambda root: root.update(post_processor={"type": "Nonsense"}), "not supported|Nonsense|Exception"),
    ],
)
def test_what_hangs_or_is_refused_is_told(change: Change, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        tried(tmp_path, change, seconds=2.0)
    assert "Traceback" not in str(caught.value)


def test_thousands_of_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="3,001 splits"):
        tried(tmp_path, split_by("q", 3000))


def test_memory_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_trial, "_passed", set())
    with pytest.raises(ModelError, match="within 20 s and 1 MiB"):
        tried(tmp_path, lambda root: None, memory=1 << 20)


def test_padding_that_nobody_asks_for_is_left_out(tmp_path: Path) -> None:
    tried(tmp_path, padded_to(100_000))
    model = write_byte_level(tmp_path / "short", LLAMA3)
    path = tmp_path / "short/tokenizer.json"
    root = json.loads(path.read_text())
    padded_to(512)(root)
    path.write_text(
        json.dumps(
            root | {"truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}}
        )
    )
    fast = fast_tokenizer(read_tokenizer(tmp_path / "short", model))
    assert fast.decode(fast.encode("some words in a row").ids) == "some words in a row"
