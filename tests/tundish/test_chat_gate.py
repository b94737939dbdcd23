"""Conversations as every runtime renders them are transformers', and the gate says where they are not."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from transformers import AutoTokenizer

from converters.chat import render
from converters.chat_template import for_exact_reader, for_trimming_reader
from converters.errors import ModelError
from converters.tokenizer import read_tokenizer
from exporters.base import Difference, Model, Target
from exporters.minja import ORT_GENAI, chat_differences
from exporters.registry import EXPORTERS
from tests.converters.tiny_tokenizers import LLAMA3, write_byte_level
from tests.exporters.tiny_graphs import BASE, random_graph
from tundish.chat_gate import compared, expected_prompts, judge, rendered
from tundish.conversations import CONVERSATIONS, Conversation
from tundish.pour import pour
from tundish.reference_chat import expected
from tundish.results import Gate

TEMPLATES = {
    # A line for each block and comments, as templates are written by hand; CRLF, as Windows saves them.
    "lines": """\
{# {{ messages }} is a list #}
{%- set greeting = 'Be kind.' -%}
{% for message in messages %}
    {% if message['role'] == 'system' %}
<system>
{{ message['content'] }} {{ greeting }}
    {% elif message['role'] == 'user' %}
    {#- the user's turn #}
<user>{{ message['content'] | trim }}</user>
    {% else %}
<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<assistant>
{% endif %}
""",
    # A system message that is cut off, tools as JSON, calls and what they gave, special tokens, arithmetic.
    "tools": """\
{{- bos_token }}{% macro turn(role, text) %}{{ '<|im_start|>' ~ role ~ '\\n' ~ text ~ '<|im_end|>\\n' }}{% endmacro %}
{%- if messages[0].role == 'system' %}{{ turn('system', messages[0]['content']) }}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{%- if tools %}{{ '<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '</tools>' }}{% endif %}
{%- for message in rest %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- turn('call', call.function.name ~ call.function.arguments | tojson) }}
        {%- endfor %}
    {%- else %}
        {{- turn(message.role ~ loop.index0 % 2, message.content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}""",
    # No system message, turns that have to alternate, and text that is markup to a reader that knows no raw block.
    "alternating": """\
{{ bos_token }}{% raw %}{{ "as is" }} {% endraw %}\
{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Turns must alternate.') }}{% endif %}\
{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'].strip() + ' [/INST]' }}\
{% else %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}\
{% endfor %}""",
}
TEMPLATES["crlf"] = TEMPLATES["lines"].replace("\n", "\r\n")
EXACT = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
TARGETS = [
    pytest.param(target, marks=pytest.mark.skipif(bool(missing), reason=f"{missing} not installed"))
    for target, exporter in EXPORTERS.items()
    for missing in [
        [name for name in (*exporter.requires, *exporter.runtime_requires) if not importlib.util.find_spec(name)]
    ]
]


def model_with(folder: Path, template: str) -> Model:
    """A tiny model whose tokenizer, in `folder`, has this chat template."""
    config = write_byte_level(folder, LLAMA3, chat_template=template)
    shape = replace(BASE, vocab_size=config.vocab_size, num_layers=1)
    return Model(random_graph(shape), read_tokenizer(folder, config), shape.context_length, "Tiny")


def expected_here(folder: Path) -> list[str | None]:
    """What tundish.reference_chat writes, in this process."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def render(conversation: Conversation) -> str:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in conversation.messages],  # type: ignore[arg-type]
                tools=[dict(tool) for tool in conversation.tools] or None,
                add_generation_prompt=conversation.prompt,
                tokenize=False,
            )
        )

    return [expected(render, conversation) for conversation in CONVERSATIONS]


def artifact_gate(target: Target, model: Model, folder: Path, prompts: Sequence[str | None]) -> Gate:
    """The gate of an artifact that lies in `folder` already, or is written there."""
    exporter = EXPORTERS[target]
    options = exporter.options()
    if not (folder / target).exists():
        pour(model.graph, {target: exporter.layout(model, options)}, folder)
    runtime = exporter.open(folder / target, options)
    found = list(rendered(runtime, compared(prompts)))
    return judge(prompts, found, exporter.differences(model, options))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_runtimes_prompts_are_transformers(target: Target, name: str, tmp_path: Path) -> None:
    model = model_with(tmp_path / "checkpoint", TEMPLATES[name])
    prompts = expected_here(tmp_path / "checkpoint")
    gate = artifact_gate(target, model, tmp_path, prompts)
    assert gate.passed, gate.detail
    assert len(compared(prompts)) >= (18 if name == "tools" else 6 if name == "alternating" else 15)
    assert "declared" not in gate.detail


@pytest.mark.parametrize("target", TARGETS)
def test_another_template_in_the_artifact_fails(target: Target, tmp_path: Path) -> None:
    model_with(tmp_path / "checkpoint", EXACT)
    prompts = expected_here(tmp_path / "checkpoint")
    other = model_with(tmp_path / "other", EXACT.replace(";", "; "))
    gate = artifact_gate(target, other, tmp_path, prompts)
    assert gate.passed is False
    assert gate.figure == len(compared(prompts))
    assert "expected ' the capital of France?;', found ' the capital of France?; '" in gate.detail


@pytest.mark.parametrize(
    ("target", "template", "name", "kinds"),
    [
        ("onnx", "{{ m.role | upper }} {{ m.content }}", "chat-template", 16),
        ("onnx", "{{ m.keys() | list | length }} {{ m.content }} {{ m.role }}", "chat-template", 16),
        ("openvino", "{{ m.role | title }} {{ m.content }}", "chat-template", 16),
        ("openvino", "{{ m.content or m.role }} {{ m.role and 'x' }}", "chat-template", 16),
        ("openvino", "{{ tools | tojson(indent=2) if tools }}{{ m.role }}{{ m.content }}", "chat-empty-json", 1),
        ("gguf", "{{ date_string | default('1 May 2024') }}: {{ m.role }} {{ m.content }}", "chat-date", 16),
    ],
)  # fmt: skip
def test_what_a_renderer_lacks_is_declared(target: str, template: str, name: str, kinds: int, tmp_path: Path) -> None:
    for module in EXPORTERS[Target(target)].runtime_requires:
        pytest.importorskip(module)
    model = model_with(tmp_path / "checkpoint", f"{{% for m in messages %}}{template}{{% endfor %}}")
    prompts = expected_here(tmp_path / "checkpoint")
    gate = artifact_gate(Target(target), model, tmp_path, prompts)
    assert gate.passed, gate.detail
    assert f"{kinds} as declared ({name})" in gate.detail


def test_a_template_that_llama_server_refuses_fails(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = model_with(tmp_path / "checkpoint", "{% for m in messages %}{{ '%s' % m.content }}{% endfor %}")
    gate = artifact_gate(Target.GGUF, model, tmp_path, expected_here(tmp_path / "checkpoint"))
    assert gate.passed is False
    assert "llama-server does not open" in gate.detail


def test_the_reference_is_transformers_in_a_process_of_its_own(tmp_path: Path) -> None:
    template = TEMPLATES["alternating"]
    listed = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": template}]
    write_byte_level(tmp_path / "one", None, chat_template=template)
    write_byte_level(tmp_path / "listed", None, chat_template=listed)
    prompts = expected_prompts(tmp_path / "listed", tmp_path, 1)
    assert prompts == tuple(expected_here(tmp_path / "one"))
    kinds = {CONVERSATIONS[index].kind for index in compared(prompts)}
    assert "several turns" in kinds
    assert not kinds & {"a system message", "tools", "a call of a tool, and what it gave"}


def test_an_endless_template_is_the_models_fault(tmp_path: Path) -> None:
    endless = "{% for i in range(9999) %}" * 3 + "{% endfor %}" * 3
    write_byte_level(tmp_path / "checkpoint", None, chat_template=endless)
    with pytest.raises(ModelError, match=r"chat template.*SIGPROF"):
        expected_prompts(tmp_path / "checkpoint", tmp_path, 1)


def test_the_gate_counts_what_is_declared_apart() -> None:
    prompts: list[str | None] = ["a", None, "c", "d"]
    tabs = Difference("tabs", "Tabs are lost.", "chat", lambda text: "system" in text)
    equal = [{"prompt": "a"}, {"prompt": "c"}, {"prompt": "d"}]
    gate = judge(prompts, equal, ())
    assert gate.passed
    assert gate.detail == "3 conversations equal; 1 left out, for which the template has no place"
    other = [{"prompt": "a"}, {"error": "RuntimeError: no"}, {"prompt": "D"}]
    assert judge(prompts, other, (tabs,)).detail.startswith(
        "1 of 3 conversations give another prompt; the first is several"
    )
    gate = judge(prompts, [*other[:2], {"prompt": "d"}], (tabs,))
    assert gate.passed
    assert "2 conversations equal; 1 as declared (tabs)" in gate.detail
    assert judge(prompts, other, ()).figure == 2
    assert judge(prompts, [*other[:2], {"prompt": "d"}], (replace(tabs, of="encoding"),)).passed is False
    for missing in (None, (), (None, None)):
        assert judge(missing, (), ()).passed is None


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_readers_are_given_means_the_same(name: str) -> None:
    template = TEMPLATES[name]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    for adapt in (for_exact_reader, for_trimming_reader):
        adapted = adapt(template)
        assert adapt(adapted) == adapted
        for conversation in CONVERSATIONS[:2] if name != "alternating" else CONVERSATIONS[:1]:
            arguments = tokens, conversation.messages, conversation.prompt
            assert render(adapted, *arguments) == render(template, *arguments)
    assert for_exact_reader(EXACT) == for_trimming_reader(EXACT) == EXACT
    assert for_trimming_reader(TEMPLATES["lines"]) == TEMPLATES["lines"]


@pytest.mark.parametrize("template", ["{% for %}", "{{" + "(" * 9999, "{{ " + "9" * 5000 + " }}", "{{ '", "{# "])
def test_a_template_that_jinja_cannot_read_stays(template: str) -> None:
    assert for_exact_reader(template) == for_trimming_reader(template) == template
    assert chat_differences(template, ORT_GENAI) == ()
