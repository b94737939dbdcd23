"""The conversations by which a container's own chat renderer is held against transformers'.

Each is of a kind that templates or their renderers are known to treat in their own way: the roles, a system message or
none, tools, white space and line ends of every sort, text that looks like markup, other scripts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Conversation:
    """`messages` and `tools` as transformers' apply_chat_template takes them; `prompt`: an answer is to follow."""

    kind: str
    messages: Sequence[Json]
    tools: Sequence[Json] = ()
    prompt: bool = True

    @property
    def text(self) -> str:
        """For exporters.base.Difference: what a template sees, as JSON."""
        return json.dumps({"messages": self.messages, "tools": self.tools}, ensure_ascii=False)

    def parts(self) -> Iterator[Conversation]:
        """The conversation without each of the things for which a template need not have a place."""
        plain = [{key: value for key, value in message.items() if key != "tool_calls"} for message in self.messages]
        for messages, tools in (
            (self.messages, ()),
            ([message for message in self.messages if message["role"] != "system"], self.tools),
            (plain, self.tools),
        ):
            if (list(messages), tools) != (list(self.messages), self.tools):
                yield replace(self, messages=messages, tools=tools)

    def words(self) -> Iterator[str]:
        """What a prompt has to say somewhere, if the template has a place for the tools and the system's message."""
        yield from (str(message["content"]).strip() for message in self.messages if message["role"] == "system")
        for tool in self.tools:
            function = tool["function"]
            assert isinstance(function, dict)
            yield function["name"]


def _talk(*contents: str, system: str | None = None) -> tuple[Json, ...]:
    """Turns of user and assistant, the user's first, after the system's message if there is one."""
    turns = [
        {"role": "assistant" if index % 2 else "user", "content": content} for index, content in enumerate(contents)
    ]
    return ({"role": "system", "content": system}, *turns) if system is not None else tuple(turns)


_WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather of a "place" today, in <b>metric</b> units & words; très exact.',
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A town's name"},
                "days": {"type": "integer", "enum": [1, 7]},
                "precise": {"type": "boolean"},
            },
            "required": ["place"],
        },
    },
}
_CLOCK: Json = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {}},
    },
}
# The id has nine letters and figures, which the templates of Mistral's models ask for.
_CALL: Json = {
    "id": "a1B2c3D4e",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"place": "Zürich", "days": 7, "precise": True}},
}
_CALLED: tuple[Json, ...] = (
    *_talk("How will the weather be in Zürich?"),
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {
        "role": "tool",
        "tool_call_id": "a1B2c3D4e",
        "name": "get_weather",
        "content": '{"sky": "clear", "degrees": 21.5}',
    },
)

CONVERSATIONS: tuple[Conversation, ...] = (
    Conversation("a question", _talk("What is the capital of France?")),
    Conversation("a system message", _talk("Why?", system="You answer in one sentence.")),
    Conversation("an empty system message", _talk("Why?", system="")),
    Conversation("several turns", _talk("One.", "Two.", "Three.", "Four.", "Five?")),
    Conversation("a system message and several turns", _talk("One.", "Two.", "Three?", system="Count.")),
    Conversation("a finished answer", _talk("One.", "Two.", system="Count."), prompt=False),
    Conversation("a question without a prompt for its answer", _talk("One?"), prompt=False),
    Conversation("spaces at the ends", _talk("  One.  ", " Two. ", "\tThree? ", system="  Count.  ")),
    Conversation("line ends at the ends", _talk("\n\nOne.\n", "\nTwo.\n\n", "\nThree?\n", system="\nCount.\n")),
    Conversation("LF", _talk("One,\n\ntwo,\n  three?\n    - four", system="Count\nup.")),
    Conversation("CR and CRLF", _talk("One,\r\ntwo,\rthree?\r\n\r\nFour", "Five.\r\n", "Six?", system="Count\r\nup.")),
    Conversation("an empty message", _talk("", "", "One?")),
    Conversation(
        "other scripts",
        _talk("Grüße, 世界! مرحبا 🙂👩‍👩‍👧 e\u0301\u200b\u00a0\u2028½?", "Да.", "ไทย?", system="日本語で。"),
    ),
    Conversation(
        "quotes, backslashes and markup",
        _talk(
            "'one' \"two\" \\n \\\\ \\u0041 <b>&amp;</b> {{ messages }} {% if %} {# #} 100 % ${x}",
            "```python\nprint('%s' % \"x\")\n```",
            "And [INST] now [/INST]?",
        ),
    ),
    Conversation(
        "text that looks like special tokens",
        _talk("<|im_end|>\n<|im_start|>system\n<s></s><|end|><|eot_id|> [INST] <<SYS>>", "<|user|>", "<unk>?"),
    ),
    Conversation("a long conversation", _talk(*(f"Message {index}." for index in range(25)), system="Count.")),
    Conversation("tools", _talk("How is the weather?"), (_WEATHER, _CLOCK)),
    Conversation("tools and a system message", _talk("How is the weather?", system="Be brief."), (_WEATHER,)),
    Conversation("a call of a tool, and what it gave", _CALLED, (_WEATHER, _CLOCK)),
)
