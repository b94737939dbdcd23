"""Texts and conversations from files of plain text, JSON and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.dataset import SUFFIXES
from converters.errors import UsageError
from converters.json_file import regular_size

PART = 1 << 22  # characters of a text that are read at once
MAX_LINE = 1 << 24  # characters of a row of .jsonl
MAX_JSON = 1 << 25  # bytes of a .json: what is parsed at once takes up to thirty times that
FIELDS = "a field text (a string) or messages (a list of role and content)"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with "role" and "content", as a chat template takes them."""

    messages: Sequence[Mapping[str, object]]

    @property
    def text(self) -> str:
        """What is said, without roles: for models that know no conversations."""
        return "".join(f"{message['content']}\n\n" for message in self.messages)


Text = str | Conversation


def text_files(path: Path) -> list[Path]:
    """The file itself, or a folder's files of text in the order of their names, those of its folders among them.

    UsageError for a folder without any, or one that cannot be read.
    """
    try:
        if not path.is_dir():
            if path.exists() and not path.is_file():
                expected = "a file or a folder"
                raise UsageError("cannot read the text", where=str(path), expected=expected, found="neither")
            return [path]
        found = sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES and each.is_file())
    except OSError as error:
        raise UsageError("cannot read the text", where=str(path), found=str(error)) from error
    if not found:
        expected = f"files *{', *'.join(SUFFIXES)}"
        raise UsageError("the folder has no text", where=str(path), expected=expected)
    return found


def read_texts(path: Path) -> Iterator[Text]:
    """A file's texts in its order: rows of .jsonl, .json (a list) and .parquet; anything else is text of UTF-8, some
    megabytes at a time.

    UsageError for a file that cannot be read, is not UTF-8 or whose rows have neither text nor messages, and for
    Parquet without pyarrow, which the extra `datasets` brings.
    """
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".jsonl":
        numbered = ((number, line) for number, line in enumerate(_parts(path, lines=True), 1) if line.strip())
        return (_row(_parse(line, path, number), f"{path}, line {number}") for number, line in numbered)
    if path.suffix == ".json":
        if (size := path.stat().st_size if path.is_file() else 0) > MAX_JSON:
            mend = "Write it as .jsonl, a row a line."
            expected = f"at most {MAX_JSON:,} bytes in one list"
            raise UsageError("the text is too large", where=str(path), expected=expected, found=f"{size:,}", mend=mend)
        rows = _parse("".join(_parts(path)), path, 1)
        if not isinstance(rows, list):
            raise UsageError("no rows of text", where=str(path), expected="a list", found=type(rows).__name__)
        return (_row(row, f"{path}, row {number}") for number, row in enumerate(rows))
    return _parts(path)


def _parts(path: Path, lines: bool = False) -> Iterator[str]:
    """A file's contents, in lines or in parts of PART characters."""
    try:
        regular_size(path)
        with path.open(encoding="utf-8") as file:
            if not lines:
                yield from iter(lambda: file.read(PART), "")
                return
            for line in iter(lambda: file.readline(MAX_LINE + 1), ""):
                if len(line) > MAX_LINE:
                    raise UsageError("a line is too long", where=str(path), expected=f"at most {MAX_LINE:,} characters")
                yield line
    except UnicodeDecodeError as error:
        raise UsageError(
            "the text is not UTF-8",
            where=f"{path}, byte {error.start}" if path.stat().st_size <= PART else str(path),
            mend="Convert it, with iconv for example, or give other text.",
        ) from error
    except OSError as error:
        raise UsageError("cannot read the text", where=str(path), found=str(error)) from error


def _parse(text: str, path: Path, line: int) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"{path}, line {line + getattr(error, 'lineno', 1) - 1}"
        raise UsageError("the text is not JSON", where=where, found=str(error)) from error


def _parquet(path: Path) -> Iterator[Text]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UsageError(
            "Parquet files need pyarrow",
            where=str(path),
            found="it is not installed",
            mend='Install the extra: pip install "tundish[datasets]"; or give .txt, .md or .jsonl.',
        ) from error
    try:
        regular_size(path)
        table = parquet.ParquetFile(path)
        columns = [name for name in ("text", "messages") if name in table.schema_arrow.names]
        for batch in table.iter_batches(batch_size=256, columns=columns):
            yield from (_row(row, str(path)) for row in batch.to_pylist())
    except (ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise UsageError("cannot read the text", where=str(path), found=str(error)) from error


def _row(row: object, where: str) -> Text:
    if isinstance(row, dict):
        if _is_text(text := row.get("text")):
            return str(text)
        messages = row.get("messages")
        if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
            return Conversation(messages)
    found = f"fields {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
    raise UsageError("a row has no text", where=where, expected=FIELDS, found=found)


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(_is_text(message.get(key)) for key in ("role", "content"))


def _is_text(value: object) -> bool:
    """Not so half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    return isinstance(value, str) and value.encode("utf-8", "replace").decode() == value
