"""Chat templates, rendered as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from converters.errors import ModelError
from converters.tokenizer import Tokenizer

WHERE = "chat_template"
MAX_SHOWN = 500  # characters of a template's own error message


class Generation(Extension):
    """The block {% generation %}, which marks the assistant's words for training: here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Macro) -> str:
        return str(caller())


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True
) -> str:
    """The prompt for a conversation; messages have "role" and "content".

    The environment is transformers': the sandbox, trimmed blocks, loop controls, raise_exception, strftime_now, tojson,
    and the special tokens as variables. Raises ModelError if there is no template, or if it fails, refuses the messages
    or reaches for Python objects. There is no limit to the time and memory that a template takes: run foreign ones in a
    process that has one, as tundish.chat_renderer does.
    """
    return render(*template_variables(tokenizer), messages, add_generation_prompt)


def template_variables(tokenizer: Tokenizer) -> tuple[str, dict[str, str]]:
    """The model's template, and the special tokens that it sees. ModelError if there is no template."""
    if tokenizer.chat_template is None:
        raise ModelError(
            "the model has no chat template",
            where="tokenizer_config.json",
            expected="chat_template there, or a file chat_template.jinja",
            mend="Base models have none: ask with plain text, or take the instruction-tuned model.",
        )
    special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_ids[0], "pad_token": tokenizer.pad_id}
    special["unk_token"] = tokenizer.unk_id
    variables = {name: tokenizer.tokens[index].text for name, index in special.items() if index is not None}
    return tokenizer.chat_template, variables


def render(
    template: str, variables: Mapping[str, str], messages: Sequence[Mapping[str, object]], add_generation_prompt: bool
) -> str:
    """render_chat by a template and its variables."""
    try:
        prompt = (
            chat_environment()
            .from_string(template)
            .render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        )
        prompt.encode()  # a template can spell half of a surrogate pair, which no tokenizer takes
    except Exception as error:
        # A template is a program: its arithmetic, indexing and filters, or compiling it, raise anything.
        raise _broken(error) from error
    return prompt


def _broken(error: Exception) -> ModelError:
    line = getattr(error, "lineno", None)
    found = f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode()
    return ModelError(
        "the chat template cannot be rendered",
        where=WHERE if line is None else f"{WHERE}, line {line}",
        found=found if len(found) <= MAX_SHOWN else found[:MAX_SHOWN] + "…",
        mend="The template comes with the model: see whether a newer revision of it has another one.",
    )


def chat_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML; a prompt wants plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(layout: str) -> str:
    return datetime.now().strftime(layout)
