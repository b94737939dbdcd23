"""What a model card says of a container, in the Hub's terms. Light on purpose: cards are written without any SDK."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Card:
    """`library` is the Hub's library_name, `runtime` what people call it, `usage` Markdown that runs the artifact from
    within its folder.

    https://huggingface.co/docs/hub/model-cards
    """

    library: str
    runtime: str
    tags: tuple[str, ...]
    usage: str
