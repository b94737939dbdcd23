"""What minja, the Jinja of onnxruntime-extensions and openvino-genai, makes of a chat template.

Facts are those of google/minja's minja.hpp, as both runtimes carry it, and hold in the runtimes that the tests open.
"""

from __future__ import annotations

import json

from converters.chat_template import chooses_by_logic, filters, formats_by_percent, indents_json
from exporters.base import Difference

FILTERS = frozenset(
    (
        *("count", "default", "dictsort", "e", "escape", "indent", "int", "items", "join", "joiner", "last", "length"),
        *("list", "lower", "map", "reject", "rejectattr", "safe", "select", "selectattr", "string", "tojson", "trim"),
        "unique",
    )
)


def chat_differences(template: str | None, runtime: str) -> tuple[Difference, ...]:
    """The kinds of conversations for which minja gives another prompt, or none."""
    if template is None:
        return ()
    differences = []
    lacking = sorted(f"the filter {name}" for name in filters(template) - FILTERS)
    lacking += ["a text formatted by %"] if formats_by_percent(template) else []
    lacking += ["a choice by and, or"] if chooses_by_logic(template) else []
    if lacking:
        sentence = (
            f"The chat template uses what {runtime} lacks: {', '.join(lacking)}. Prompts may differ or fail there: "
            "render conversations by transformers."
        )
        differences.append(Difference("chat-template", sentence, "chat", lambda conversation: True))
    if indents_json(template):
        sentence = f"{runtime} breaks the line inside an empty object or list of a tool, where transformers does not."
        differences.append(Difference("chat-empty-json", sentence, "chat", _has_empty))
    return tuple(differences)


def _has_empty(conversation: str) -> bool:
    """Whether tools or calls have an empty object or list."""
    document = json.loads(conversation)
    calls = [message.get("tool_calls") for message in document["messages"] if message.get("tool_calls")]
    return bool(document["tools"] or calls) and _empty_inside([*document["tools"], *calls])


def _empty_inside(value: object) -> bool:
    if not isinstance(value, dict | list):
        return False
    return not value or any(map(_empty_inside, value.values() if isinstance(value, dict) else value))
