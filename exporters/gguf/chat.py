"""Conversations as llama.cpp renders them: by llama-server, which reads the file's template with its own Jinja.

libllama's llama_chat_apply_template knows some templates by their looks and reads none; llama-server and llama-cli do
not call it any more.
"""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import xllamacpp

from converters.errors import GateError

_CONTEXT = 256  # tokens, the fewest that llama.cpp allocates
_SECONDS = 60  # for an answer


class ChatServer:
    """llama-server with its defaults for chats, on a port of this machine alone; it computes nothing.

    The weights are mapped from the file and not copied.
    """

    def __init__(self, path: Path) -> None:
        self._key = secrets.token_hex(16)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.cache_ram_mib = _CONTEXT, 1, 0
        params.warmup = params.fit_params = params.ui = False
        params.no_extra_bufts = True  # no second copy of the weights in another order
        params.prefill_assistant = False  # an assistant's last message ends as others do
        params.api_keys = [self._key]
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise GateError(
                "llama-server does not open the artifact; it refuses chat templates that it cannot read",
                where=str(path),
                found=str(error),
            ) from error
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def render(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]], prompt: bool
    ) -> str:
        """The prompt. GateError with the server's words if it has none."""
        body: dict[str, object] = {"messages": [_in_openai_form(message) for message in messages]}
        body |= {"add_generation_prompt": prompt} | ({"tools": tools} if tools else {})
        request = urllib.request.Request(  # noqa: S310 - the address is our own server's
            f"{self._server.listening_address}/apply-template",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        try:
            with self._open(request, timeout=_SECONDS) as answer:
                return str(json.loads(answer.read())["prompt"])
        except urllib.error.HTTPError as error:
            raise GateError(
                "llama-server cannot render the conversation", where="chat template", found=error.read().decode()
            ) from error


def _in_openai_form(message: Mapping[str, object]) -> dict[str, object]:
    """The server takes a call's arguments as a text of JSON, and gives them to templates as they want them."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return dict(message)
    spelled = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in calls
    ]
    return {**message, "tool_calls": spelled}
