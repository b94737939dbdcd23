"""A tokenizer.json made from tokenizer.model encodes and decodes as SentencePiece and transformers do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer

from converters.tokenizer import read_tokenizer
from converters.tokenizer_json import ensure_tokenizer_json
from tests.converters.tiny_tokenizers import gate_texts, mistral_file, write_byte_level, write_sentencepiece
from tundish.corpus import TOKEN_CORPUS


def test_ids_equal_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(str(mistral_file("tokenizer.model.v1")))
    record = read_tokenizer(tmp_path, write_sentencepiece(tmp_path, tokenizer_class="TokenizersBackend"))
    fast = FastTokenizer.from_str(ensure_tokenizer_json(record))
    for text in TOKEN_CORPUS:
        if "<s>" in text or "</s>" in text or "<unk>" in text or model.normalize(text) != "▁" + text.replace(" ", "▁"):
            continue  # text that SentencePiece normalizes or takes literally, and transformers does not
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ids == model.encode(text), text
        assert fast.decode(ids) == model.decode(ids), text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"phi3": True},
        {"legacy": False},
        {"legacy": False, "add_prefix_space": False},
        {"add_eos_token": True},
        {"tokenizer_class": "TokenizersBackend", "add_bos_token": True},
        {"tokenizer_class": "TokenizersBackend", "legacy": False},
    ],
    ids=str,
)
def test_ids_equal_transformers(settings: dict[str, bool], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    record = read_tokenizer(tmp_path, write_sentencepiece(tmp_path, **settings))
    fast = FastTokenizer.from_str(ensure_tokenizer_json(record))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in gate_texts(record):
        ids = reference(text)["input_ids"]
        assert fast.encode(text).ids == ids, text
        assert fast.decode(ids, skip_special_tokens=False) == reference.decode(ids), text


def test_filler_rows_are_left_out_and_the_text_is_stable(tmp_path: Path) -> None:
    record = read_tokenizer(tmp_path, write_sentencepiece(tmp_path, phi3=True))
    text = ensure_tokenizer_json(record)
    assert len(json.loads(text)["model"]["vocab"]) == 32011
    assert ensure_tokenizer_json(read_tokenizer(tmp_path, write_sentencepiece(tmp_path, phi3=True))) == text


def test_the_checkpoints_own_file_is_taken_as_it_is(tmp_path: Path) -> None:
    record = read_tokenizer(tmp_path, write_byte_level(tmp_path, None))
    assert ensure_tokenizer_json(record) == (tmp_path / "tokenizer.json").read_text()
