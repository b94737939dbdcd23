"""Texts and conversations from the kinds of files in which they are kept."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from converters.errors import UsageError
from tundish.text_files import Conversation, read_texts, text_files

TALK = [{"role": "user", "content": "Hello ü"}, {"role": "assistant", "content": "Hi"}]
ROWS = [{"text": "one\n\n ü", "id": 1}, {"messages": TALK}]


def test_rows_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    for name in ("a.jsonl", "a.json"):
        assert list(read_texts(tmp_path / name)) == ["one\n\n ü", Conversation(TALK)]
    assert Conversation(TALK).text == "Hello ü\n\nHi\n\n"


def test_plain_text_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Ä\n\n{}\n", encoding="utf-8")
    assert list(read_texts(tmp_path / "a.md")) == ["# Ä\n\n{}\n"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [str(i) for i in range(600)], "other": [1] * 600}), path)
    assert list(read_texts(path)) == [str(i) for i in range(600)]
    parquet.write_table(pyarrow.table({"messages": [TALK, TALK]}), path)
    assert list(read_texts(path)) == [Conversation(TALK)] * 2
    parquet.write_table(pyarrow.table({"other": [1]}), path)
    with pytest.raises(UsageError, match="a row has no text"):
        list(read_texts(path))
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match="cannot read the text"):
        list(read_texts(path))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"need pyarrow .*a\.parquet.*tundish\[datasets\]"):
        list(read_texts(tmp_path / "a.parquet"))


def test_a_folder_s_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "c.bin", "d/a.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in text_files(tmp_path)] == ["a.jsonl", "b.txt", "d/a.md"]
    assert text_files(tmp_path / "c.bin") == [tmp_path / "c.bin"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}', r"no text .*line 2\).*field text.*found fields text"),
        ("a.jsonl", b'{"text": "x"}\n[]', r"no text .*line 2\).*found list"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": ', r"not JSON .*line 3\)"),
        ("a.jsonl", b'{"text": "\\ud800"}', "no text"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "no text"),
        ("a.jsonl", b'{"messages": []}', "no text"),
        ("a.json", b'{"text": "x"}', r"no rows of text .*expected a list; found dict"),
        ("a.json", b"[\n1,", r"not JSON .*line 2\)"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.txt", b"good \xff", r"not UTF-8 .*byte 5\)"),
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(read_texts(tmp_path / name))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the text .*gone\.txt"):
        list(read_texts(tmp_path / "gone.txt"))


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UsageError, match=r"cannot read the text .*pipe\.txt.*expected a file or a folder"):
        text_files(tmp_path / "pipe.txt")


def test_large_texts_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tundish.text_files.PART", 10)
    (tmp_path / "t.txt").write_text("ä" * 25, encoding="utf-8")
    assert list(read_texts(tmp_path / "t.txt")) == ["ä" * 10, "ä" * 10, "ä" * 5]
