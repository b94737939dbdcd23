"""One key of a GGUF file's key-value section, with its type."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGUFValueType


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of the file. `item` is the type of an array's items."""

    key: str
    value: object
    type: GGUFValueType
    item: GGUFValueType | None = None


def string(key: str, value: str) -> Entry:
    return Entry(key, value, GGUFValueType.STRING)


def u32(key: str, value: int) -> Entry:
    return Entry(key, value, GGUFValueType.UINT32)


def i32(key: str, value: int) -> Entry:
    return Entry(key, value, GGUFValueType.INT32)


def f32(key: str, value: float) -> Entry:
    return Entry(key, value, GGUFValueType.FLOAT32)


def boolean(key: str, value: bool) -> Entry:
    return Entry(key, value, GGUFValueType.BOOL)


def array(key: str, value: list[str] | list[int] | list[float], item: GGUFValueType) -> Entry:
    return Entry(key, value, GGUFValueType.ARRAY, item)
