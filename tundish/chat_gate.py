"""Conversations in the container's own chat renderer, held against transformers'."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from converters.errors import ModelError
from exporters.base import Difference, Runtime
from tundish.child import run_child
from tundish.conversations import CONVERSATIONS
from tundish.results import Gate

CHAT_GATE = "chat"
_SECONDS = 60  # for all conversations, the start of transformers included
_AROUND = 24  # characters shown on both sides of the first that differs


def expected_prompts(folder: Path, scratch: Path, threads: int) -> tuple[str | None, ...] | None:
    """Each conversation's prompt by transformers for the checkpoint in `folder`; see tundish.reference_chat.expected.

    None if transformers is not installed; empty without a template. ModelError for a template that takes too long.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    result = scratch / "prompts.json"
    arguments = [str(folder), str(result)]
    failure = run_child("tundish.reference_chat", arguments, scratch / "prompts.log", _SECONDS, threads).failure
    if failure:
        raise ModelError(
            "transformers cannot render the chat template",
            where=str(folder),
            found=failure,
            mend="The template comes with the model: see whether a newer revision of it has another one.",
        )
    return tuple(json.loads(result.read_text(encoding="utf-8")))


def compared(expected: Sequence[str | None] | None) -> list[int]:
    """The indices of the conversations that a container has to render as transformers does."""
    return [index for index, prompt in enumerate(expected or ()) if prompt is not None]


def rendered(runtime: Runtime, indices: Sequence[int]) -> Iterator[dict[str, str]]:
    """For the worker: {"prompt"} of each conversation, or {"error"}."""
    for index in indices:
        conversation = CONVERSATIONS[index]
        try:
            yield {"prompt": runtime.render(conversation.messages, conversation.tools, conversation.prompt)}
        except Exception as error:  # renderers' exceptions share no base, and another prompt is a failure as well
            yield {"error": f"{type(error).__name__}: {error}"}


def judge(
    expected: Sequence[str | None] | None, found: Sequence[Mapping[str, str]], differences: Sequence[Difference]
) -> Gate:
    """`found` has what `rendered` gave for `compared(expected)`. Declared differences are counted apart."""
    if expected is None:
        return Gate(CHAT_GATE, None, detail="transformers is not installed, so there is no reference")
    if not expected:
        return Gate(CHAT_GATE, None, detail="the model has no chat template")
    indices = compared(expected)
    if not indices:
        return Gate(CHAT_GATE, None, detail="the template takes none of the conversations")
    declared: dict[str, int] = {}
    wrong: list[str] = []
    for index, result in zip(indices, found, strict=True):
        prompt = expected[index]
        assert prompt is not None
        if result.get("prompt") == prompt:
            continue
        text = CONVERSATIONS[index].text
        name = next((each.name for each in differences if each.of == "chat" and each.applies(text)), None)
        if name is None:
            wrong.append(f"{CONVERSATIONS[index].kind}: {_difference(prompt, result)}")
        else:
            declared[name] = declared.get(name, 0) + 1
    return Gate(CHAT_GATE, not wrong, float(len(wrong)), 0.0, _detail(expected, indices, wrong, declared), declared)


def _detail(
    expected: Sequence[str | None], indices: Sequence[int], wrong: Sequence[str], declared: Mapping[str, int]
) -> str:
    phrases = []
    if wrong:
        phrases.append(f"{len(wrong)} of {len(indices)} conversations give another prompt; the first is {wrong[0]}")
    else:
        phrases.append(f"{len(indices) - sum(declared.values())} conversations equal")
    phrases += [f"{count} as declared ({name})" for name, count in declared.items()]
    if len(indices) < len(expected):
        phrases.append(f"{len(expected) - len(indices)} left out, for which the template has no place")
    return "; ".join(phrases)


def _difference(prompt: str, result: Mapping[str, str]) -> str:
    if "error" in result:
        return result["error"][: 8 * _AROUND]
    found = result["prompt"]
    pairs = enumerate(zip(prompt, found, strict=False))
    at = next((index for index, (one, other) in pairs if one != other), min(len(prompt), len(found)))
    shown = slice(max(0, at - _AROUND), at + _AROUND)
    return f"expected {prompt[shown]!r}, found {found[shown]!r}"
