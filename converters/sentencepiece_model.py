"""SentencePiece's tokenizer.model: pieces, scores and types, read from the protobuf wire format.

Field numbers: sentencepiece_model.proto of google/sentencepiece (ModelProto, TrainerSpec, NormalizerSpec). The file
is a few simple messages, so that neither protobuf nor sentencepiece is needed to read it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

from converters.errors import ModelError
from converters.json_file import read_small
from converters.vocabulary import SpacePrefix, Token, TokenizerKind, TokenType, Vocabulary

PIECES, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
TRAINER_MODEL_TYPE, TRAINER_WHITESPACE_SUFFIX, TRAINER_BYTE_FALLBACK = 3, 24, 35
NORMALIZER_ADD_DUMMY_PREFIX = 3
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
PIECE_TYPES = {
    1: TokenType.NORMAL,
    2: TokenType.UNKNOWN,
    3: TokenType.CONTROL,
    4: TokenType.USER_DEFINED,
    5: TokenType.UNUSED,
    6: TokenType.BYTE,
}
_MAX_NBYTES = 1 << 24  # a vocabulary of 256,000 pieces has a quarter
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def read_sentencepiece(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.model. Raises ModelError if it is damaged or not BPE with byte fallback."""
    try:
        return _vocabulary(read_small(path, _MAX_NBYTES), path.name)
    except (OSError, IndexError, struct.error, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            "the SentencePiece model cannot be read",
            where=path.name,
            found=f"{type(error).__name__}: {error}",
            mend="The file is damaged or no SentencePiece model (a Git LFS pointer, perhaps): fetch it again.",
        ) from error


def _vocabulary(data: bytes, where: str) -> Vocabulary:
    tokens: dict[int, Token] = {}
    trainer: dict[int, object] = {}
    normalizer: dict[int, object] = {}
    for field, value in _fields(data):
        if field == PIECES:
            tokens[len(tokens)] = _piece(_message(value))
        elif field == TRAINER_SPEC:
            trainer = dict(_fields(_message(value)))
        elif field == NORMALIZER_SPEC:
            normalizer = dict(_fields(_message(value)))
    if not tokens:
        raise IndexError("no pieces")
    model_type = _number(trainer.get(TRAINER_MODEL_TYPE, 1))
    if model_type != 2 or not trainer.get(TRAINER_BYTE_FALLBACK) or trainer.get(TRAINER_WHITESPACE_SUFFIX):
        raise ModelError(
            "this kind of SentencePiece model is not supported",
            where=where,
            expected="BPE with byte fallback and white space in front of words",
            found=f"{MODEL_TYPES.get(model_type, model_type)}"
            f"{'' if trainer.get(TRAINER_BYTE_FALLBACK) else ' without byte fallback'}"
            f"{' with white space at the end of words' if trainer.get(TRAINER_WHITESPACE_SUFFIX) else ''}",
        )
    dummy_prefix = normalizer.get(NORMALIZER_ADD_DUMMY_PREFIX, 1)
    return Vocabulary(
        TokenizerKind.SENTENCEPIECE, tokens, space_prefix=SpacePrefix.ALWAYS if dummy_prefix else SpacePrefix.NEVER
    )


def _piece(data: bytes) -> Token:
    fields = dict(_fields(data))
    text = _message(fields[PIECE_TEXT]).decode()
    (score,) = struct.unpack("<f", _message(fields.get(PIECE_SCORE, b"\0\0\0\0")))
    if not math.isfinite(score):
        raise ValueError(f"the score {score} of {text!r}")
    return Token(text, PIECE_TYPES[_number(fields.get(PIECE_TYPE, 1))], score)


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError("a message where a number is expected")
    return value


def _message(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a number where a message is expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, object]]:
    """(field number, value) of a protobuf message: int for varints, raw bytes for all else."""
    offset = 0
    while offset < len(data):
        tag, offset = _varint(data, offset)
        wire = tag & 7
        if wire == VARINT:
            number, offset = _varint(data, offset)
            yield tag >> 3, number
            continue
        if wire == BYTES:
            size, offset = _varint(data, offset)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise IndexError(f"wire type {wire} at byte {offset}")
        if offset + size > len(data):
            raise IndexError(f"a field of {size} bytes at byte {offset} of {len(data)}")
        yield tag >> 3, data[offset : offset + size]
        offset += size


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):  # 64 bits are ten bytes at most
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise IndexError(f"a number of more than ten bytes before byte {offset}")
