"""The gates of tokens: ids and texts of an artifact's tokenizer against those of transformers.

Texts that differ as the container declares are counted apart: they do not fail, and they are named.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.errors import ModelError
from converters.source import Source
from exporters.base import Difference
from tundish.child import run_child
from tundish.results import Gate

TOKENS, DECODING = "tokens", "decoding"
_NO_REFERENCE = "transformers is not installed, so there is no reference"
_SECONDS = 300
_SHOWN = 60  # characters of a text


@dataclass(frozen=True, slots=True)
class TokenReference:
    """What transformers makes of the texts. `decoded` are its texts of these ids, without special tokens."""

    ids: tuple[tuple[int, ...], ...]
    decoded: tuple[str, ...]


def token_reference(source: Source, texts: Sequence[str], folder: Path, threads: int) -> TokenReference | None:
    """By transformers in a process of its own, which leaves its files in `folder`; None if it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    request, result = folder / "texts.json", folder / "ids.json"
    request.write_text(json.dumps(list(texts)), encoding="utf-8")
    arguments = [str(source.folder), str(request), str(result)]
    failure = run_child("tundish.reference_tokenizer", arguments, folder / "ids.log", _SECONDS, threads).failure
    if failure:
        raise ModelError("transformers cannot read this tokenizer", where=str(source.folder), found=failure)
    found = json.loads(result.read_text(encoding="utf-8"))
    return TokenReference(tuple(tuple(ids) for ids in found["ids"]), tuple(found["decoded"]))


def token_gates(
    texts: Sequence[str],
    reference: TokenReference | None,
    ids: Sequence[Sequence[int]],
    decoded: Sequence[str],
    differences: Sequence[Difference],
    threshold: float,
) -> list[Gate]:
    """Two gates: `ids` of the texts, and what the reference's ids were `decoded` into. Of the texts that no declared
    difference explains, at most the share `threshold` may differ."""
    if reference is None:
        return [Gate(name, None, detail=_NO_REFERENCE) for name in (TOKENS, DECODING)]

    def gate(name: str, of: str, wrong: list[int], first: Callable[[int], str]) -> Gate:
        kinds = [difference for difference in differences if difference.of == of]
        declared: Counter[str] = Counter()
        unexplained = []
        for index in wrong:
            kind = next((kind for kind in kinds if kind.applies(texts[index])), None)
            if kind is None:
                unexplained.append(index)
            else:
                declared[kind.name] += 1
        detail = f"{len(texts) - len(wrong)} texts equal"
        if declared:
            names = ", ".join(f"{name}: {count}" for name, count in sorted(declared.items()))
            detail += f", {declared.total()} differ as declared ({names})"
        if unexplained:
            index = unexplained[0]
            detail += f", {len(unexplained)} differ; the first is {texts[index][:_SHOWN]!r}, {first(index)}"
        share = len(unexplained) / len(texts)
        return Gate(name, share <= threshold, share, threshold, detail, dict(declared))

    def where_ids_part(index: int) -> str:
        expected, found = reference.ids[index], ids[index]
        at = _parting(expected, found)
        return f"from token {at} on: expected {list(expected[at : at + 6])}, found {list(found[at : at + 6])}"

    def where_texts_part(index: int) -> str:
        expected, found = reference.decoded[index], decoded[index]
        at = _parting(expected, found)
        return f"from character {at} on: expected {expected[at : at + 12]!r}, found {found[at : at + 12]!r}"

    pairs = enumerate(zip(reference.ids, ids, strict=True))
    wrong_ids = [index for index, (expected, found) in pairs if list(expected) != list(found)]
    both = enumerate(zip(reference.decoded, decoded, strict=True))
    wrong_texts = [index for index, (expected, found) in both if expected != found]
    return [
        gate(TOKENS, "encoding", wrong_ids, where_ids_part),
        gate(DECODING, "decoding", wrong_texts, where_texts_part),
    ]


def _parting(expected: Sequence[object], found: Sequence[object]) -> int:
    """The first place where two sequences differ."""
    pairs = enumerate(zip(expected, found, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(expected), len(found)))
