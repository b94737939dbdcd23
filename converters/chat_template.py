"""A chat template's source: what it uses, and the same program written so that less depends on its reader.

Renderers of containers read Jinja in their own way. They differ first of all in white space: whether a line end after a
block belongs to the text, and the indentation before it, as transformers has neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import loopcontrols

from converters.chat import Generation, chat_environment

Node = TypeVar("Node", bound=nodes.Node)

_OPENING = {"block_begin": "{% ", "variable_begin": "{{ "}
_CLOSING = {"block_end": " %}", "variable_end": " }}"}
_LEFT_OUT = frozenset(
    ("comment_begin", "comment", "comment_end", "linecomment_begin", "linecomment", "linecomment_end", "raw_begin")
) | {"raw_end"}


def for_trimming_reader(template: str) -> str:
    """The template for a reader that trims as jinja2 does, but knows no raw block and takes line ends as they are."""
    return _without_white_space_rules(template) if "\r" in template or _has_raw(template) else template


def for_exact_reader(template: str) -> str:
    """The template for a reader that trims nothing by itself, and is otherwise as the one above."""
    plain = Environment(extensions=[Generation, loopcontrols])  # noqa: S701 - it reads and renders nothing
    if _data(chat_environment(), template) == _data(plain, template):
        return for_trimming_reader(template)
    return _without_white_space_rules(template)


def _has_raw(template: str) -> bool:
    try:
        return any(kind == "raw_begin" for _, kind, _ in chat_environment().lex(template))
    except TemplateSyntaxError:
        return False


def _without_white_space_rules(template: str) -> str:
    """The same program, whatever its reader does with white space around blocks: comments go, line ends are LF, and
    text that begins or ends in white space becomes an expression. Templates that jinja2 cannot read stay as they are.

        {% if a %}            {% if a %}{{ "x
        x                ->   " }}{% endif %}
        {% endif %}
    """
    try:
        return "".join(_rewritten(template))
    except TemplateSyntaxError:
        return template


def _rewritten(template: str) -> Iterator[str]:
    inside: list[str] = []
    for _, kind, value in chat_environment().lex(template):
        if kind in _LEFT_OUT:
            continue
        if kind == "data":
            yield _text(value)
        elif kind in _OPENING:
            inside = []
            yield _OPENING[kind]
        elif kind in _CLOSING:
            yield "".join(inside).strip() + _CLOSING[kind]
        else:
            inside.append(value)


def _text(data: str) -> str:
    """Text as an expression where a reader could trim it or take it for markup."""
    if data == data.strip() and "{" not in data:
        return data
    quote = "'" if '"' in data else '"'
    escaped = data.replace("\\", "\\\\").replace(quote, f"\\{quote}")
    return f"{{{{ {quote}{escaped}{quote} }}}}"


def _data(environment: Environment, template: str) -> list[str] | None:
    """The pieces of text between the template's blocks; None where jinja2 cannot read it."""
    try:
        tokens = list(environment.lex(template))
    except TemplateSyntaxError:
        return None
    return [value for _, kind, value in tokens if kind == "data"]


def variables(template: str) -> frozenset[str]:
    """The names that the template reads, its own included; none where jinja2 cannot read it."""
    return frozenset(node.name for node in _nodes(template, nodes.Name) if node.ctx == "load")


def filters(template: str) -> frozenset[str]:
    """The filters that the template applies."""
    return frozenset(node.name for node in _nodes(template, nodes.Filter))


def methods(template: str) -> frozenset[str]:
    """The methods that the template calls."""
    called = (node.node for node in _nodes(template, nodes.Call))
    return frozenset(node.attr for node in called if isinstance(node, nodes.Getattr))


def indents_json(template: str) -> bool:
    """Whether the template prints JSON over several lines."""
    return any(node.name == "tojson" and (node.args or node.kwargs) for node in _nodes(template, nodes.Filter))


def formats_by_percent(template: str) -> bool:
    """Whether the template has a text before a `%`, as Python formats texts."""
    return any(
        isinstance(node.left, nodes.Const) and isinstance(node.left.value, str) for node in _nodes(template, nodes.Mod)
    )


def chooses_by_logic(template: str) -> bool:
    """Whether the template prints or keeps what `and` and `or` choose, where other readers have true and false."""
    logic = (nodes.And, nodes.Or)
    printed = (child for node in _nodes(template, nodes.Output) for child in node.nodes)
    kept = (node.node for node in _nodes(template, nodes.Assign))
    joined = (child for node in _nodes(template, nodes.Concat) for child in node.nodes)
    added = (child for node in _nodes(template, nodes.Add) for child in (node.left, node.right))
    return any(isinstance(node, logic) for node in (*printed, *kept, *joined, *added))


def _nodes(template: str, kind: type[Node]) -> list[Node]:
    try:
        return list(chat_environment().parse(template).find_all(kind))
    except (TemplateSyntaxError, RecursionError, ValueError):  # ValueError: a number of more digits than Python reads
        return []
