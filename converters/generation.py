"""generation_config.json: special ids and sampling defaults that the publisher states for generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.config_keys import shown
from converters.errors import ModelError
from converters.json_file import Json, inside, read_json

FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Generation:
    """What the file states; None where it is silent. A checkpoint without the file has an empty record."""

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    sampling: Mapping[str, float | int | bool] = field(default_factory=dict)


# Sampling keys, their type and the largest value that makes sense; the smallest is 0.
_SAMPLING: dict[str, tuple[type | tuple[type, ...], float, str]] = {
    "do_sample": (bool, True, "true or false"),
    "temperature": ((int, float), 1e6, "a number from 0 to a million"),
    "top_k": (int, 2**31 - 1, "an integer, 0 or above"),
    "top_p": ((int, float), 1, "a number from 0 to 1"),
}


def read_generation(folder: Path) -> Generation:
    """The folder's generation_config.json, if there is one. ModelError names the key with an impossible value."""
    path = folder / FILE
    if not path.exists():
        return Generation()
    raw = read_json(inside(folder, FILE))
    sampling: dict[str, float | int | bool] = {}
    for key, (kind, largest, expected) in _SAMPLING.items():
        value = raw.get(key)
        if value is None:
            continue
        number = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))  # True is an int to Python
        if not number or not isinstance(value, int | float) or not 0 <= value <= largest:
            raise ModelError("impossible value", where=f"{FILE}, key {key}", expected=expected, found=shown(value))
        sampling[key] = value
    return Generation(
        token_id(raw.get("bos_token_id"), f"{FILE}, key bos_token_id"),
        token_ids(raw.get("eos_token_id"), f"{FILE}, key eos_token_id"),
        token_id(raw.get("pad_token_id"), f"{FILE}, key pad_token_id"),
        sampling,
    )


def token_id(value: Json, where: str) -> int | None:
    """One special id; -1 stands for "none" in old conversions of Llama."""
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ModelError("impossible token id", where=where, expected="an id, 0 or above", found=shown(value))
    return value


def token_ids(value: Json, where: str) -> tuple[int, ...] | None:
    """One id or a list of them, in the publisher's order without repetitions; None if not stated."""
    if value is None:
        return None
    found = [token_id(each, where) for each in (value if isinstance(value, list) else [value])]
    return tuple(dict.fromkeys(each for each in found if each is not None))
