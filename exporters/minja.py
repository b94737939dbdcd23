"""What minja, the Jinja of onnxruntime-extensions and openvino-genai, makes of a chat template.

Facts are those of google/minja's minja.hpp, as both runtimes carry it, and hold in the runtimes that the tests open.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from converters.chat_template import chooses_by_logic, filters, formats_by_percent, indents_json, methods
from exporters.base import Difference


@dataclass(frozen=True, slots=True)
class Minja:
    """One runtime's minja: its filters, and the methods of its texts, lists and objects."""

    runtime: str
    filters: frozenset[str]
    methods: frozenset[str]


_FILTERS = frozenset(
    (
        *("count", "default", "dictsort", "e", "escape", "indent", "int", "items", "join", "last", "length", "list"),
        *("lower", "map", "reject", "rejectattr", "safe", "select", "selectattr", "string", "tojson", "trim", "unique"),
    )
)
_METHODS = frozenset(
    (
        *("append", "pop", "insert", "items", "get", "strip", "lstrip", "rstrip", "split", "capitalize", "endswith"),
        *("startswith", "title"),
    )
)
ORT_GENAI = Minja("ONNX Runtime GenAI", _FILTERS, _METHODS)
OPENVINO_GENAI = Minja("openvino-genai", _FILTERS | {"upper"}, _METHODS | {"keys", "lower", "replace", "upper"})


def chat_differences(template: str | None, minja: Minja) -> tuple[Difference, ...]:
    """The kinds of conversations for which this minja gives another prompt, or none."""
    if template is None:
        return ()
    differences = []
    lacking = [f"the filter {name}" for name in sorted(filters(template) - minja.filters)]
    lacking += [f"the method {name}" for name in sorted(methods(template) - minja.methods)]
    lacking += ["a text formatted by %"] if formats_by_percent(template) else []
    lacking += ["a choice by and, or"] if chooses_by_logic(template) else []
    if lacking:
        sentence = (
            f"The chat template uses what {minja.runtime} lacks: {', '.join(lacking)}. Prompts may differ or fail "
            "there: render conversations by transformers."
        )
        differences.append(Difference("chat-template", sentence, "chat", lambda conversation: True))
    if indents_json(template):
        sentence = (
            f"{minja.runtime} breaks the line inside an empty object or list of a tool, where transformers does not."
        )
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
