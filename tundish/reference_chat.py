"""The prompts of all conversations by transformers' own apply_chat_template, in a process of its own.

python -m tundish.reference_chat FOLDER PROMPTS.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from tundish.chat_renderer import CHARACTERS, MEMORY, SECONDS, limit_memory, limit_time
from tundish.child import exit_with_parent
from tundish.conversations import CONVERSATIONS, Conversation

Render = Callable[[Conversation], str]


def main(folder: str, result: str) -> None:
    """Write a JSON list with a prompt for each conversation, null for those that the template has no place for."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    limit_memory(MEMORY)

    def render(conversation: Conversation) -> str:
        limit_time(SECONDS)
        prompt = tokenizer.apply_chat_template(
            [dict(message) for message in conversation.messages],  # type: ignore[arg-type]  # contents are more than str
            tools=[dict(tool) for tool in conversation.tools] or None,
            chat_template=template,
            add_generation_prompt=conversation.prompt,
            tokenize=False,
        )
        return str(prompt)

    prompts = [expected(render, conversation) for conversation in CONVERSATIONS] if template else []
    limit_time(0)
    Path(result).write_text(json.dumps(prompts), encoding="utf-8")


def expected(render: Render, conversation: Conversation) -> str | None:
    """The prompt; None if the template refuses the conversation or leaves out its tools, calls or system message.

    What a template has no place for, runtimes drop, refuse or put elsewhere, each in its own way: no prompt is right.
    """
    prompt = _rendered(render, conversation)
    if prompt is None or len(prompt) > CHARACTERS:
        return None
    shown = all(word in prompt for word in conversation.words())
    return prompt if shown and all(_rendered(render, part) != prompt for part in conversation.parts()) else None


def _rendered(render: Render, conversation: Conversation) -> str | None:
    try:
        prompt = render(conversation)
        prompt.encode()
    except Exception:  # a template is a program, and raises whatever its expressions do
        return None
    return prompt


if __name__ == "__main__":
    exit_with_parent()
    main(*sys.argv[1:])
