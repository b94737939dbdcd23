"""Prompts are those of transformers' apply_chat_template."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from converters.chat import render_chat
from converters.errors import ModelError
from converters.tokenizer import Tokenizer, read_tokenizer
from tests.converters.tiny_tokenizers import write_byte_level

CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# The forms of Phi-3.5-mini-instruct's and Llama-3.1-8B-Instruct's published templates.
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n' + "
    "message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system message goes into its own slot #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
            + message['content'] | trim + '<|eot_id|>' }}
    {%- else %}
        {{- raise_exception("No tools here!") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
ODD = """\
  {% for message in messages %}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {{ message | tojson }} {{ pad_token }}|{{ unk_token }}|{{ nothing }}
    {% generation %}
{{ message.content | upper }}{% endgeneration %}
  {% endfor %}
{{ messages | tojson(indent=2) }}
"""
CONVERSATIONS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "  Be brief, <b>bold</b> & 'kind'. é 中 \n"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye\n"},
    ],
)


def record(folder: Path, template: str) -> Tokenizer:
    model = write_byte_level(folder, None, chat_template=template, pad_token="<|endoftext|>")
    return read_tokenizer(folder, model)


@pytest.mark.parametrize("template", [CHATML, PHI3, LLAMA3, ODD], ids=["chatml", "phi3", "llama3", "odd"])
def test_prompts_equal_transformers(template: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = record(tmp_path, template)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert render_chat(tokenizer, messages, prompt) == expected


def test_the_date_is_todays(tmp_path: Path) -> None:
    before = datetime.now().strftime("%d %b %Y")
    prompt = render_chat(record(tmp_path, LLAMA3), CONVERSATIONS[0])
    assert before in prompt or datetime.now().strftime("%d %b %Y") in prompt


def test_no_template(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path, write_byte_level(tmp_path, None))
    with pytest.raises(ModelError, match="no chat template"):
        render_chat(tokenizer, CONVERSATIONS[0])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ strftime_now.__globals__['os'].system('true') }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError|no loader|TemplateNotFound"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' * 10 ** 15 }}", "OverflowError|MemoryError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError"),
        ("{% for i in [1] %}" * 50 + "{% endfor %}" * 50, "SyntaxError"),
        ("{% set c = cycler() %}", "RuntimeError|TypeError"),
        (r"{{ '\ud800' }}", "surrogates not allowed"),
        (r"{{ raise_exception('\ud800') }}", r"\\ud800"),
        ("{{ messages | tojson(indent='x', sort_keys=nothing.there) }}", "UndefinedError"),
    ],
)
def test_a_bad_template_is_the_models_fault(template: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        render_chat(record(tmp_path, template), CONVERSATIONS[0])
    assert "chat_template" in str(caught.value)
    assert (tmp_path / "tokenizer.json").exists()


def test_messages_are_not_changed(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(ModelError):
        render_chat(record(tmp_path, "{{ messages[0].update(content='y') }}"), messages)
    assert messages == [{"role": "user", "content": "x"}]
