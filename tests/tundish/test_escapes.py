"""What strangers write is shown, and means nothing, in papers and on terminals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from exporters.base import Target
from exporters.registry import EXPORTERS
from tests.tundish.test_cards import manifest as card_manifest
from tests.tundish.test_report import gate
from tundish.cards import model_card
from tundish.console import people, show
from tundish.escapes import in_a_line, json_line, markdown, terminal
from tundish.events import written
from tundish.report import write_report
from tundish.tables import columns

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</td><script>alert(1)</script>",
    "[x](https://evil.example) ![y](https://evil.example/y.png)",
    "https://evil.example www.evil.example",
    "**bold** _it_ ~~no~~ `code` $x$ &lt;b&gt; \\",
    "# title",
    "- item",
    "1. item",
    "---",
    "a | b",
    "a\n\n# b\n\n<b>c</b>",
]
ALLOWED = {"p", "h1", "h2", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}


def tags(text: str) -> set[str]:
    """Of the HTML that a Markdown text comes to."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found = parser.parse(text)
    found = found + [child for token in found for child in token.children or ()]
    return {token.tag for token in found if token.tag} | {
        token.type for token in found if token.type in ("html_block", "html_inline", "image", "code_inline")
    }


def shown(text: str) -> str:
    """What a reader sees of a Markdown line."""
    (inline,) = [token for token in MarkdownIt("commonmark").parse(text) if token.type == "inline"]
    return "".join(child.content for child in inline.children or ())


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_a_text_and_means_nothing(text: str) -> None:
    assert tags(markdown(text)) == {"p"}
    assert shown(markdown(text)) == " ".join(text.split())
    assert "://" not in markdown(text) and "<" not in markdown(text)


def hostile(text: str) -> dict[str, Any]:
    """A manifest that has a text wherever a stranger may have written it."""
    result = {
        "passed": False,
        "versions": {"r": text},
        "divergence": None,
        "answer": text,
        "gates": [gate("stops", False, detail=f"which begin {text}")],
    }
    made = card_manifest({"gguf": result}, name=text, licence=text, repo_id=None, revision=text)
    made["recipe"] |= {"name": text, "description": text}
    made["targets"] = {"gguf": made["targets"]["gguf"]}
    made["remarks"] = [text]
    made["calibration"] = {"source": "text", "method": "plain", "text": text}
    return made


@pytest.mark.parametrize("text", HOSTILE)
def test_no_paper_has_markup_of_strangers(text: str) -> None:
    made = hostile(text)
    assert tags(write_report(made)) <= ALLOWED
    card = model_card(made, "gguf", EXPORTERS[Target.GGUF].card)
    plain = model_card(hostile("plain"), "gguf", EXPORTERS[Target.GGUF].card)
    body, own = (each.partition("\n---")[2] for each in (card, plain))
    assert tags(body) == tags(own) and body.count("\n\n") == own.count("\n\n")


ESCAPES = "a\x1b]0;owned\x07\x9b31m\r\u202eb\x7f"


def test_a_terminal_is_told_nothing_by_a_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert terminal("naïve 模型 ×\u00a0\n") == "naïve 模型 ×\u00a0\n"
    assert columns([["a"], [f"{ESCAPES}\nb"]]).count("\n") == 1
    with people() as told:
        told.say(f"model: {ESCAPES}")
        told.start(ESCAPES, 1)
    show({"name": ESCAPES}, False, lambda document: str(document["name"]))
    show({"name": ESCAPES}, True, str)
    with written("-") as events:
        events.emit("message", message=ESCAPES)
    said = capsys.readouterr()
    lines = f"{said.out}{said.err}".splitlines()
    assert all(line.isprintable() for line in lines) and len(lines) == 7
    assert json.loads(json_line({"name": f"{ESCAPES}\U000e0001"})) == {"name": f"{ESCAPES}\U000e0001"}
    assert in_a_line("a\nb\x1b") == "a b\N{REPLACEMENT CHARACTER}"
