"""What a checkpoint's own model card says that its artifacts have to carry on, and the files of its licence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from converters.errors import ModelError
from converters.json_file import inside
from tundish.recipe_yaml import YAML_TAG, bounded_parser

CARD = "README.md"
_CARD_LIMIT = 16384  # characters of a model card that are looked at; its head is at the top
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "COPYING")  # and with an ending, such as LICENSE.md
_LICENCE_BYTES = 1 << 18  # of a licence, generously: what is larger is none
# All of them are held, and copied to every artifact; a checkpoint comes with one or two.
_LICENCE_FILES, _LICENCES_BYTES = 16, 1 << 20


@dataclass(frozen=True, slots=True)
class SourceCard:
    """Of a card's YAML front matter, in the Hub's terms: `license` (an SPDX id, or "other" with a name and a link),
    `license_name`, `license_link` and `language`. None, or empty, is what the card does not state soundly.

    https://huggingface.co/docs/hub/model-cards
    """

    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    languages: tuple[str, ...] = ()


def read_source_card(folder: Path) -> SourceCard:
    """Of the checkpoint in a folder; an empty one if it has no card, or one for people only. ModelError if the card is
    a link out of the folder."""
    front = _front_matter(folder)
    return SourceCard(
        licence=_text(front.get("license")),
        licence_name=_text(front.get("license_name")),
        licence_link=_text(front.get("license_link")),
        languages=_texts(front.get("language")),
    )


def licence_files(folder: Path) -> dict[str, bytes]:
    """The texts of the checkpoint's licence, by name, for whoever gets an artifact of it.

    ModelError if one is a link out of the folder: what it leads to is not the checkpoint's to give away. So if one is
    too long to be a licence, or there are too many.
    """
    paths = [path for path in sorted(folder.iterdir()) if _is_licence(path)]
    sizes = {path: path.stat().st_size for path in paths}
    for path, size in sizes.items():
        if size > _LICENCE_BYTES:
            raise ModelError(
                "a licence too long to be one",
                where=str(path),
                expected=f"at most {_LICENCE_BYTES:,} bytes",
                found=f"{size:,}",
                mend="Move it out of the checkpoint's folder if it is something else.",
            )
    if len(paths) > _LICENCE_FILES or sum(sizes.values()) > _LICENCES_BYTES:
        raise ModelError(
            "too many files of licences",
            where=str(folder),
            expected=f"at most {_LICENCE_FILES} files and {_LICENCES_BYTES:,} bytes together",
            found=f"{len(paths):,} files and {sum(sizes.values()):,} bytes",
            mend="Move those out of the checkpoint's folder that are something else.",
        )
    return {path.name: inside(folder, path.name).read_bytes() for path in paths}


def _is_licence(path: Path) -> bool:
    return path.name.split(".")[0].split("-")[0].upper() in _LICENCES and path.is_file()


def _front_matter(folder: Path) -> Mapping[str, Node]:
    if not (folder / CARD).is_file():
        return {}
    with inside(folder, CARD).open(encoding="utf-8", errors="replace") as file:
        text = file.read(_CARD_LIMIT)
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        front = bounded_parser().compose(text[4:].split("\n---", 1)[0])
    except (YAMLError, ValueError, LookupError, RecursionError, AssertionError):
        return {}  # a card for humans whose head is no sound YAML states nothing
    if not isinstance(front, MappingNode):
        return {}
    return {key.value: value for key, value in front.value if isinstance(key, ScalarNode)}


def _texts(node: Node | None) -> tuple[str, ...]:
    """Of a list or a single value. Nodes are looked at as they are written: aliases and tags may come to anything."""
    nodes = node.value if isinstance(node, SequenceNode) else [node]
    return tuple(text for each in nodes if (text := _text(each)))


def _text(node: Node | None) -> str | None:
    if not isinstance(node, ScalarNode) or str(node.tag) != f"{YAML_TAG}str":
        return None
    text = str(node.value)
    return text if text.isprintable() and text.strip() else None
