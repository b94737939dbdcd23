"""Inputs made worse, by what their format is: bytes, or documents of JSON. All choices come from one Random."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Mutate = Callable[[bytes, Random], bytes]

MAX_NBYTES = 1 << 17
NUMBERS = (0, 1, 2, 3, 4, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
HOSTILE: tuple[Json, ...] = (
    None, True, False, *NUMBERS, *(-number for number in NUMBERS), 10**40, 0.5, -0.0, 1e-320, 1e308, 1e38,
    "", "\0", "..", "../../../etc/passwd", "/etc/passwd", "/dev/zero", "\ud800", "\U0001f600", "x" * 5000, "NaN", "-1",
    "{{ x }}", [], {}, [[]], [None], [0] * 100, {"": None}, {"__class__": 1},
)  # fmt: skip
RAW = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1" * 5000, b'"\\ud83d"', b"[" * 3000, b'{"a":' * 3000)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Bits, bytes, integers and stretches changed, removed, doubled; often at the start, where headers are."""
    value = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at = random.randrange(len(value) + 1) if random.random() < 0.5 else random.randrange(min(len(value), 64) + 1)
        match random.randrange(8):
            case 0 if at < len(value):
                value[at] ^= 1 << random.randrange(8)
            case 1 if at < len(value):
                value[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x7B, random.randrange(256)))
            case 2:
                del value[at:]
            case 3:
                del value[at : at + random.randrange(1, 64)]
            case 4:
                value[at:at] = random.randbytes(random.randrange(1, 16))
            case 5:
                stretch = value[at : at + random.randrange(1, 256)]
                value[at:at] = stretch * random.choice((1, 2, 50))
            case 6:
                number = random.choice(NUMBERS)
                layout = random.choice(["<I", "<Q", ">I", ">Q", "<H"])
                packed = struct.pack(layout, number % 256 ** struct.calcsize(layout))
                value[at : at + len(packed)] = packed
            case _:
                value += random.randbytes(random.randrange(1, 32))
    return bytes(value[:MAX_NBYTES])


def mutate_text(words: tuple[str, ...]) -> Mutate:
    """Bytes, or words of a language put, doubled and removed between its lines and within."""

    def mutate(data: bytes, random: Random) -> bytes:
        if random.random() < 0.3:
            return mutate_bytes(data, random)
        text = data.decode(errors="replace")
        for _ in range(random.choice((1, 1, 2, 5))):
            lines = text.split("\n")
            row = random.randrange(len(lines))
            at = random.randrange(len(lines[row]) + 1)
            match random.randrange(4):
                case 0:
                    lines[row] = lines[row][:at] + random.choice(words) + lines[row][at:]
                case 1:
                    lines[row] = lines[row][:at] + random.choice(words)
                case 2:
                    lines.insert(row, lines[row])
                case _:
                    del lines[row]
            text = "\n".join(lines)
        return text.encode(errors="replace")[:MAX_NBYTES]

    return mutate


def mutate_json(data: bytes, random: Random) -> bytes:
    """A value somewhere replaced, removed, doubled or put elsewhere; or bytes."""
    if random.random() < 0.15:
        return mutate_bytes(data, random)
    try:
        document: Json = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, random)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        document = _worse(document, random, document)
    text = json.dumps(document).encode(errors="replace")
    if random.random() < 0.1:
        at = text.rfind(b":", 0, random.randrange(len(text) + 1)) + 1
        text = text[:at] + random.choice(RAW) + text[at:].lstrip(b' "0123456789')
    return text[:MAX_NBYTES]


def _worse(value: Json, random: Random, root: Json) -> Json:
    if isinstance(value, dict) and value and random.random() < 0.85:
        name = random.choice(list(value))
        match random.randrange(8):
            case 0:
                return {key: inner for key, inner in value.items() if key != name}
            case 1:
                return value | {random.choice(("", "../x", name + "x", "x" * 3000)): value[name]}
            case 2:
                return value | {name: value[random.choice(list(value))]}
        return value | {name: _worse(value[name], random, root)}
    if isinstance(value, list) and value and random.random() < 0.85:
        at = random.randrange(len(value))
        match random.randrange(6):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value[:at] + value[at : at + 1] * random.choice((2, 9, 200)) + value[at + 1 :]
        return [*value[:at], _worse(value[at], random, root), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.4:
        return value + random.choice((-1, 1)) * random.choice((1, 2, value))
    if isinstance(value, str) and value and random.random() < 0.4:
        at = random.randrange(len(value))
        return value[:at] + random.choice(("", value, "\0", "\u2581", "[[", ".*" * 20, "(?:a+)+$")) + value[at + 1 :]
    return random.choice(HOSTILE)


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """The header's JSON, its length kept true; or bytes."""
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.3 or length > len(data):
        return mutate_bytes(data, random)
    header = mutate_json(data[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
