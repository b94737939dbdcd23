"""Which build a folder holds, and whether it is the one that was meant: a signature says who built, not what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from converters.errors import GateError, UsageError
from tundish.integrity import Intact

FORM = "recipe=NAME or recipe=DIGEST, model=NAME or model=OWNER/NAME, commit=HASH"
NOTHING: Mapping[str, str] = MappingProxyType({})


def identity(manifest: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """What a build is called, by what may be expected of it; the first is how it is told."""
    source, recipe = manifest["source"], manifest["recipe"]
    return {
        "recipe": (recipe["name"], manifest["recipe_digest"]),
        "model": tuple(name for name in (source["repo_id"], source["name"]) if name),
        "commit": (source["revision"] or "none",),
    }


def parse_expectations(given: Sequence[str]) -> dict[str, str]:
    """Of `NAME=VALUE`s. UsageError for what nothing can be expected of, or twice."""
    parsed: dict[str, str] = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in ("recipe", "model", "commit") or not value or name in parsed:
            raise UsageError("nothing to expect of a build", where="--expect", expected=f"{FORM}, once", found=text)
        parsed[name] = value
    return parsed


def require_expected(folder: Path, manifest: dict[str, Any], expected: Mapping[str, str]) -> None:
    """GateError if the build is another one than expected."""
    found = identity(manifest)
    wrong = [name for name, value in expected.items() if value not in found[name]]
    if wrong:
        raise GateError(
            "another build than the one expected",
            where=str(folder),
            expected=", ".join(f"{name}={expected[name]}" for name in wrong),
            found=", ".join(f"{name}={found[name][0]}" for name in wrong),
            mend="It may be intact and signed: whoever signs several can have put one in another's place.",
        )


def told(intact: Intact) -> str:
    """Which build that is, and who signed it, in a line."""
    build = ", ".join(f"{name} {names[0]}" for name, names in identity(intact.manifest).items())
    key = f", by the key {intact.key_id}" if intact.key_id else ""
    return f"build: {build}; {intact.signature.value}{key}"
