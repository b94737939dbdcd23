"""Texts, datasets, conversations and the model's own words become sequences of tokens; what is of no use is refused."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from importlib import resources
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from converters.chat import render_chat
from converters.dataset import Dataset
from converters.errors import ModelError, UsageError
from converters.source import Source
from exporters.base import Model
from tests.tundish.tiny import INT4, write_recipe
from tundish.calibration_text import Documentation, Files, OwnText, calibration_sequences, digest
from tundish.documentation import documentation
from tundish.heldout import evaluation_text
from tundish.model import open_model
from tundish.recipe import load_recipe

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    recipe = write_recipe(tmp_path_factory.mktemp("recipe") / "r.yaml", checkpoint, schemes=INT4)
    return open_model(Source("tiny", checkpoint), load_recipe(recipe))


@pytest.fixture(scope="module")
def oracle(checkpoint: Path):
    return transformers.AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)


def with_bos(model: Model) -> Model:
    """A model that wants BOS in front of every text."""
    return replace(model, tokenizer=replace(model.tokenizer, add_bos=True, bos_id=3))


def prose(words: int) -> str:
    rng = np.random.default_rng(0)
    return " ".join("".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(words))


def write(path: Path, text: str) -> Files:
    path.write_text(text, encoding="utf-8")
    return Files(path)


def test_windows_do_not_overlap_and_depend_on_the_seed(model: Model, oracle, tmp_path: Path) -> None:
    text = write(tmp_path / "t.txt", prose(2000))
    first = calibration_sequences(model, text, 8, 32, seed=0)
    assert first.shape == (8, 32) and first.dtype == np.int64
    np.testing.assert_array_equal(first, calibration_sequences(model, text, 8, 32, seed=0))
    assert (first != calibration_sequences(model, text, 8, 32, seed=1)).any()
    stream = oracle(prose(2000) + "\n\n", add_special_tokens=False).input_ids
    windows = [tuple(stream[start : start + 32]) for start in range(0, len(stream), 32)]
    places = [windows.index(tuple(row)) for row in first.tolist()]
    assert places == sorted(set(places))


def test_bos_begins_each_sequence_once(model: Model, tmp_path: Path) -> None:
    text = write(tmp_path / "t.txt", prose(2000))
    for chat in (False, True):
        ids = calibration_sequences(with_bos(model), text, 8, 32, seed=0, chat=chat)
        assert ids.shape == (8, 32)
        assert (ids[:, 0] == 3).all() and (ids[:, 1:] != 3).all()


def test_a_folder_is_read_in_the_order_of_names(model: Model, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.txt", prose(2000))
    folder = tmp_path / "many"
    folder.mkdir()
    write(folder / "a.txt", prose(2000))
    (folder / "b.bin").write_bytes(b"\xff" * 99)
    expected = calibration_sequences(model, whole, 4, 16, seed=0)
    np.testing.assert_array_equal(calibration_sequences(model, Files(folder), 4, 16, seed=0), expected)


def test_the_built_in_text_is_long_enough_and_no_evaluation_text(model: Model) -> None:
    assert calibration_sequences(model, Documentation(), 64, 512, seed=0).shape == (64, 512)
    texts = list(documentation())
    assert len(texts) > 1000 and min(map(len, texts)) >= 30
    assert not [text for text in texts if ">>>" in text and text not in topics.values()]
    words = " ".join(" ".join(texts).split())
    held_out = " ".join(evaluation_text()).split()
    shared = [start for start in range(len(held_out) - 8) if " ".join(held_out[start : start + 8]) in words]
    assert shared == []


def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match="this Python has no documentation"):
        list(documentation())


def test_text_as_messages(model: Model, oracle, tmp_path: Path) -> None:
    paragraphs = [prose(60) + f" {number}" for number in range(40)]
    ids = calibration_sequences(model, write(tmp_path / "t.txt", "\n\n".join(paragraphs)), 3, 900, seed=0, chat=True)
    start = oracle.apply_chat_template([{"role": "user", "content": ""}], tokenize=True, return_dict=False)[:3]
    assert (ids[:, :2] == start[:2]).all()  # each begins as a conversation does
    shown = [oracle.decode(row) for row in ids.tolist()]
    asked = Counter(part.split("<|im_end|>")[0] for text in shown for part in text.split("<|im_start|>user\n")[1:])
    whole = {"\n\n".join(paragraphs[at : at + 3]) for at in range(0, 40, 3)}
    complete = [each for each in asked if each in whole]
    assert len(complete) >= 3 and max(asked.values()) == 1
    assert "<|im_start|>assistant\n<|im_start|>user" in shown[0]


def test_conversations_as_they_are(model: Model, oracle, tmp_path: Path) -> None:
    talks = [
        [{"role": "user", "content": f"{number} " + prose(20)}, {"role": "assistant", "content": prose(30)}]
        for number in range(20)
    ]
    rows = write(tmp_path / "t.jsonl", "\n".join(json.dumps({"messages": talk}) for talk in talks))
    possible = [oracle.apply_chat_template(talk, tokenize=True, return_dict=False) for talk in talks]
    ids = calibration_sequences(model, rows, 5, 60, seed=0, chat=True)
    places = [next(at for at, talk in enumerate(possible) if talk[:60] == row) for row in ids.tolist()]
    assert len(set(places)) == 5 and places != sorted(places)
    plain = calibration_sequences(model, rows, 5, 60, seed=0)
    assert "<|im_start|>" not in oracle.decode(plain.ravel())


def test_its_own_text(model: Model, oracle) -> None:
    written: list[int] = []
    ids = calibration_sequences(model, OwnText(), 4, 40, seed=0, advance=written.append)
    assert ids.shape == (4, 40) and sum(written) == 160
    assert (calibration_sequences(with_bos(model), OwnText(), 4, 40, seed=0)[:, 0] == 3).all()
    talks = calibration_sequences(model, OwnText(), 4, 40, seed=0, chat=True)
    opening = oracle("<|im_start|>user\n", add_special_tokens=False).input_ids
    assert (talks[:, : len(opening)] == opening).all()
    chatty = replace(model, tokenizer=replace(model.tokenizer, eos_ids=tuple(range(0, len(model.tokenizer.tokens), 2))))
    shown = oracle.decode(calibration_sequences(chatty, OwnText(), 4, 40, seed=0, chat=True)[0])
    assert "<|im_start|>assistant\n" in shown and shown.count("<|im_start|>user\n") > 1


def test_templates_that_do_not_serve(model: Model, tmp_path: Path) -> None:
    none = replace(model, tokenizer=replace(model.tokenizer, chat_template=None))
    for origin in (write(tmp_path / "t.txt", prose(2000)), OwnText()):
        with pytest.raises(ModelError, match="no chat template"):
            calibration_sequences(none, origin, 1, 20, seed=0, chat=True)
    twice = replace(none, tokenizer=replace(none.tokenizer, chat_template="{{ messages[0].content * 2 }}"))
    assert render_chat(twice.tokenizer, [{"role": "user", "content": "a"}]) == "aa"
    with pytest.raises(ModelError, match=r"expected one message shown once.*found 2 times"):
        calibration_sequences(twice, OwnText(), 1, 20, seed=0, chat=True)


def test_datasets_are_fetched_as_far_as_needed(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(dataset: Dataset, name: str) -> Path:
        fetched.append(name)
        return tmp_path / name

    monkeypatch.setattr("converters.hub_dataset.fetch", fetch)
    monkeypatch.setattr("tundish.calibration_text.MOST", 20_000)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} {prose(2000)}")  # 12,000 characters
    dataset = Dataset("acme/prose", "c0ffee" * 6, ("a.txt", "b.txt", "c.txt"))
    assert calibration_sequences(model, dataset, 2, 32, seed=0).shape == (2, 32)
    assert fetched == ["a.txt", "b.txt"]
    assert calibration_sequences(model, dataset, 20, 50, seed=0).shape == (20, 50)
    assert fetched[2:] == ["a.txt", "b.txt", "c.txt"]  # 32 characters a token
    with pytest.raises(UsageError, match=r"too short \(acme/prose at c0ffeec0ffee\)"):
        calibration_sequences(model, dataset, 500, 500, seed=0)


def test_what_is_cut_off_is_said(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tundish.calibration_text.MOST", 5999)
    text = write(tmp_path / "t.txt", prose(1000))  # 5,999 characters
    said: list[str] = []
    whole = calibration_sequences(model, text, 2, 32, seed=0, say=said.append)
    assert said == []
    write(tmp_path / "t.txt", prose(1000) + "!" * 999)
    cut = calibration_sequences(model, text, 2, 32, seed=0, say=said.append)
    assert said == [f"calibration: of {tmp_path / 't.txt'} the first 5,999 characters are read"]
    np.testing.assert_array_equal(whole, cut)


def test_too_few_tokens_are_no_fault_of_the_text(model: Model, tmp_path: Path) -> None:
    text = write(tmp_path / "t.txt", prose(2000))
    with pytest.raises(UsageError, match=r"too few tokens.*calibration\.length.*at least 16 tokens; found 3 × 5"):
        calibration_sequences(model, text, 3, 5, seed=0)
    with pytest.raises(UsageError, match=r"tokens besides those that begin each sequence; found 20 × 1"):
        calibration_sequences(with_bos(model), text, 20, 1, seed=0)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"too short.*expected 4 sequences of 16 tokens; found 0 tokens"),
        (b"   \n\n  ", "too short"),
        (b"good " * 9 + b"\xff\xfe", "not UTF-8.*byte 45"),
        (b"a" * 5000, "says nothing.*different tokens"),
    ],
)
def test_a_text_of_no_use(model: Model, tmp_path: Path, content: bytes, message: str, chat: bool) -> None:
    if chat and "says nothing" in message:
        message = "says nothing|too short"  # one message is one sequence
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        calibration_sequences(model, Files(tmp_path / "t.txt"), 4, 16, seed=0, chat=chat)


def test_a_missing_text(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the text.*gone\.txt"):
        calibration_sequences(model, Files(tmp_path / "gone.txt"), 4, 16, seed=0)


def test_a_folder_without_text(model: Model, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"the folder has no text.*expected files \*\.txt"):
        calibration_sequences(model, Files(tmp_path), 4, 16, seed=0)


def test_held_out_text_is_refused(model: Model, tmp_path: Path) -> None:
    """All of it, and any of its paragraphs in the middle of other text, whatever its spaces and its case."""
    whole = (resources.files("tundish") / "data" / "heldout.txt").read_text(encoding="utf-8")
    part = evaluation_text()[3].upper().replace("\n", "  ")
    other = prose(2000)
    for text in (whole, f"{other}\n\n{part}\n{other}"):
        for file, content in (("t.txt", text), ("t.jsonl", json.dumps({"text": text}))):
            with pytest.raises(UsageError, match=rf"held out.*{file}"):
                calibration_sequences(model, write(tmp_path / file, content), 4, 16, seed=0)
    assert calibration_sequences(model, write(tmp_path / "t.txt", other), 4, 16, seed=0).shape == (4, 16)


def test_the_digest() -> None:
    ids = np.array([[1, 2], [3, 4]], np.int64)
    expected = hashlib.sha256(b"".join(each.to_bytes(8, "little") for each in (1, 2, 3, 4))).hexdigest()
    assert digest(ids) == expected == digest(np.asfortranarray(ids))
