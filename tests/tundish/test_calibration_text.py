"""Calibration text becomes windows of tokens, and a text that is of no use is refused."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer

from converters.errors import UsageError
from converters.source import Source
from converters.tokenizer_json import ensure_tokenizer_json
from exporters.base import Model
from tests.tundish.tiny import INT4, write_recipe
from tundish import calibration_text
from tundish.calibration_text import calibration_sequences
from tundish.heldout import evaluation_text
from tundish.model import open_model
from tundish.recipe import load_recipe


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    recipe = write_recipe(tmp_path_factory.mktemp("recipe") / "r.yaml", checkpoint, schemes=INT4)
    return open_model(Source("tiny", checkpoint), load_recipe(recipe))


def prose(words: int) -> str:
    rng = np.random.default_rng(0)
    return " ".join("".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(words))


def test_windows_do_not_overlap_and_depend_on_the_seed(model: Model, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(prose(2000), encoding="utf-8")
    first = calibration_sequences(model, tmp_path / "t.txt", 8, 32, seed=0)
    assert first.shape == (8, 32) and first.dtype == np.int64
    np.testing.assert_array_equal(first, calibration_sequences(model, tmp_path / "t.txt", 8, 32, seed=0))
    assert (first != calibration_sequences(model, tmp_path / "t.txt", 8, 32, seed=1)).any()
    body = first[:, 1:] if model.tokenizer.add_bos else first
    assert len({tuple(row) for row in body.tolist()}) == 8
    if model.tokenizer.add_bos:
        assert set(first[:, 0].tolist()) == {model.tokenizer.bos_id}


def test_a_folder_is_read_in_the_order_of_names(model: Model, tmp_path: Path) -> None:
    text = prose(2000)
    (tmp_path / "whole.txt").write_text(text, encoding="utf-8")
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "a.txt").write_text(text, encoding="utf-8")
    (folder / "b.bin").write_bytes(b"\xff" * 99)
    whole = calibration_sequences(model, tmp_path / "whole.txt", 4, 16, seed=0)
    np.testing.assert_array_equal(calibration_sequences(model, folder, 4, 16, seed=0), whole)


def test_the_built_in_text_is_long_enough(model: Model) -> None:
    assert calibration_sequences(model, None, 64, 512, seed=0).shape == (64, 512)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"too short.*expected 4 sequences of 16 tokens; found 0 tokens"),
        (b"too little", "too short"),
        (b"good " * 9 + b"\xff\xfe", "not UTF-8.*byte 45"),
        (b"a" * 5000, "says nothing.*different tokens"),
    ],
)
def test_a_text_of_no_use(model: Model, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        calibration_sequences(model, tmp_path / "t.txt", 4, 16, seed=0)


def test_a_missing_text(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the calibration text.*gone\.txt"):
        calibration_sequences(model, tmp_path / "gone.txt", 4, 16, seed=0)


def test_a_folder_without_text(model: Model, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"folder of calibration text is empty.*expected \.txt or \.md files"):
        calibration_sequences(model, tmp_path, 4, 16, seed=0)


def test_held_out_text_is_refused(model: Model, tmp_path: Path) -> None:
    """All of it, and any of its paragraphs in the middle of other text, whatever its spaces and its case."""
    path = tmp_path / "t.txt"
    shutil.copy(Path(str(files("tundish"))) / "data" / "heldout.txt", path)
    with pytest.raises(UsageError, match=r"held out.*t\.txt"):
        calibration_sequences(model, path, 4, 16, seed=0)
    other = prose(2000)
    path.write_text(other + "\n\n" + evaluation_text()[3].upper().replace("\n", "  ") + "\n" + other, encoding="utf-8")
    with pytest.raises(UsageError, match=r"held out.*t\.txt"):
        calibration_sequences(model, path, 4, 16, seed=0)
    path.write_text(other, encoding="utf-8")
    assert calibration_sequences(model, path, 4, 16, seed=0).shape == (4, 16)


def test_pieces_follow_one_another(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    text = prose(3000)
    monkeypatch.setattr(calibration_text, "_PIECE", 500)
    token_ids = calibration_text._token_ids(model, [text[:7000], text[7000:]])
    assert FastTokenizer.from_str(ensure_tokenizer_json(model.tokenizer)).decode(token_ids.tolist()) == text
