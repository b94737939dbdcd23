"""What the model reads for calibration: documentation from Python's standard library, or the user's own text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer

from converters.errors import UsageError
from converters.tokenizer_json import ensure_tokenizer_json
from exporters.base import Model
from tundish.heldout import evaluation_text

BUILT_IN = "pydoc_data.topics"
_PIECE = 1 << 16  # characters that are tokenized at a time
_TOGETHER = 16  # pieces whose encodings, far larger than their ids, are held
_LEAST_DISTINCT = 16  # token ids in a text that is worth calibrating with
_RUN = 16  # words in a row that no two texts share by chance


def calibration_sequences(model: Model, text: Path | None, sequences: int, length: int, seed: int) -> NDArray[np.int64]:
    """Token ids i64[sequences, length]: windows of the text that do not overlap, chosen at random by the seed.

    `text` is a UTF-8 file, or a folder whose .txt and .md files are read in the order of their names; None: Python's
    documentation. Each window begins with BOS where the model wants one. UsageError says what is wrong with a text, or
    how much it lacks, and refuses one that has held-out text in it.
    """
    where = f"Python's documentation ({BUILT_IN})" if text is None else str(text)
    bos = [model.tokenizer.bos_id] if model.tokenizer.add_bos and model.tokenizer.bos_id is not None else []
    taken = length - len(bos)
    stream = _token_ids(model, _documentation() if text is None else _files(text))
    distinct = len(np.unique(stream))
    if taken and len(stream) >= taken and distinct < _LEAST_DISTINCT:
        raise UsageError(
            "the calibration text says nothing",
            where=where,
            expected="prose or code as the model will read it",
            found=f"{distinct} different tokens",
        )
    available = len(stream) // taken if taken else 0
    if available < sequences:
        raise UsageError(
            "the calibration text is too short",
            where=where,
            expected=f"{sequences} sequences of {length} tokens",
            found=f"{len(stream):,} tokens",
            mend="Give more text, or lower calibration.sequences or calibration.length.",
        )
    chosen = np.sort(np.random.default_rng(seed).choice(available, sequences, replace=False))
    windows = stream[: available * taken].reshape(available, taken)[chosen].astype(np.int64)
    return np.concatenate([np.tile(np.array(bos, np.int64), (sequences, 1)), windows], axis=1)


def _token_ids(model: Model, contents: Iterable[str]) -> NDArray[np.int32]:
    """Of all contents one after the other, without BOS."""
    fast = FastTokenizer.from_str(ensure_tokenizer_json(model.tokenizer))
    fast.no_truncation()
    parts = [np.empty(0, np.int32)]
    pieces: list[str] = []

    def encode() -> None:
        parts.extend(np.array(each.ids, np.int32) for each in fast.encode_batch(pieces, add_special_tokens=False))
        pieces.clear()

    for content in contents:
        for start in range(0, len(content), _PIECE):
            pieces.append(content[start : start + _PIECE])
            if len(pieces) == _TOGETHER:
                encode()
    encode()
    return np.concatenate(parts)


def _documentation() -> Iterator[str]:
    from pydoc_data import topics  # half a megabyte that only calibration needs

    return (topics.topics[name] for name in sorted(topics.topics))


def _files(text: Path) -> Iterator[str]:
    held_out = set(_runs(_words("\n".join(evaluation_text()))))
    for path in _paths(text):
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError("the calibration text is not UTF-8", where=f"{path}, byte {error.start}") from error
        except OSError as error:
            raise UsageError("cannot read the calibration text", where=str(path), found=str(error)) from error
        if any(run in held_out for run in _runs(_words(content))):
            raise UsageError(
                "the calibration text has text in it that is held out, for the measurements of verification",
                where=str(path),
                mend="Take other text.",
            )
        yield content


def _paths(text: Path) -> list[Path]:
    if not text.is_dir():
        return [text]
    try:
        found = sorted(path for path in text.rglob("*") if path.suffix in (".txt", ".md") and path.is_file())
    except OSError as error:
        raise UsageError("cannot read the calibration text", where=str(text), found=str(error)) from error
    if not found:
        raise UsageError("the folder of calibration text is empty", where=str(text), expected=".txt or .md files")
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(words[start : start + _RUN]) for start in range(len(words) - _RUN + 1))
