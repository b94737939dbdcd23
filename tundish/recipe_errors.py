"""What pydantic found wrong with a recipe, or does not serve its model, told in the user's words and at their lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from converters.errors import UsageError
from tundish.recipe_yaml import Json, Located, Problem, Where

Path = tuple[str | int, ...]

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "model_type": "keys with values",
    "model_attributes_type": "keys with values",
    "dict_type": "keys with values",
    "mapping_type": "keys with values",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_short": "at least {min_length} of them",
    "greater_than_equal": "{ge:g} or more",
    "less_than_equal": "{le:g} or less",
    "enum": "{expected}",
    "literal_error": "{expected}",
    "value_error": "{error}",
}


class MisfitError(UsageError):
    """A recipe that is right by itself, and one of whose values does not serve this model. `key` leads to it, such as
    ("budget", "size"); who knows the recipe's file tells its line (`at`)."""

    def __init__(
        self,
        what: str,
        key: Path,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        mend: str | None = None,
    ) -> None:
        super().__init__(what, where=where or _dotted(key), expected=expected, found=found, mend=mend)
        self.key = key

    def at(self, where: Where | None) -> MisfitError:
        """The same, at that line; at none, it names its key again."""
        parts = {"expected": self.expected, "found": self.found, "mend": self.mend}
        return MisfitError(self.what, self.key, where=None if where is None else str(where), **parts)


def locate(located: Located, path: Sequence[str | int]) -> tuple[Located, Path]:
    """The value at `path`, or the innermost one that exists on the way, and the part of the path that leads to it."""
    at = located
    for depth, step in enumerate(path):
        inner = _inner(at, step)
        if inner is None:
            return at, tuple(path[:depth])
        at = inner
    return at, tuple(path)


def _inner(at: Located, step: str | int) -> Located | None:
    if isinstance(at.value, Mapping):
        return at.value.get(str(step))
    if isinstance(at.value, tuple) and isinstance(step, int) and step < len(at.value):
        return at.value[step]
    return None


def problems_of(error: ValidationError, located: Located, schema: Mapping[str, Json]) -> list[Problem]:
    """A Problem for each mistake in the recipe `located`; `schema` is its JSON Schema, which knows the keys."""
    problems: list[Problem] = []
    wrong: dict[Path, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        path: Path = details["loc"]
        at, reached = locate(located, path)
        if details["type"] == "extra_forbidden":
            problems.append(_unknown_key(path, at.where, _keys_at(schema, path[:-1])))
        elif details["type"] == "missing":
            problems.append(_missing_key(path, at.where))
        else:
            # A value that may be of several kinds has an error for each kind, all reaching the same place.
            wrong.setdefault(reached, []).append(details)
    return problems + [_wrong_value(path, locate(located, path)[0], choices) for path, choices in wrong.items()]


def _unknown_key(path: Path, where: Where, known: list[str]) -> Problem:
    key = str(path[-1])
    near = get_close_matches(key, known, 1)
    return Problem(
        f"unknown key {key!r}{_inside(path)}",
        where,
        expected="one of " + ", ".join(known),
        mend=f"Did you mean {near[0]}?" if near else None,
    )


def _missing_key(path: Path, where: Where) -> Problem:
    return Problem(f"missing key {str(path[-1])!r}{_inside(path)}", where)


def _wrong_value(path: Path, at: Located, errors: list[ErrorDetails]) -> Problem:
    expected = " or ".join(dict.fromkeys(_expected(details) for details in errors))
    found = at.plain()
    mend = None
    if isinstance(found, str):
        near = get_close_matches(found, _names(errors), 1)
        mend = f"Did you mean {near[0]}?" if near else None
    elif isinstance(found, int | float) and expected == "text":
        mend = "Put it in quotes."
    return Problem(f"wrong value for {_dotted(path)}", at.where, expected, _shown(found), mend)


def _expected(details: ErrorDetails) -> str:
    template = _EXPECTED.get(details["type"])
    return template.format(**details.get("ctx", {})) if template else details["msg"]


def _names(errors: list[ErrorDetails]) -> list[str]:
    """The names that a value may have, where it has to be one of a few."""
    listed = [_expected(details) for details in errors if details["type"] in ("enum", "literal_error", "value_error")]
    return [name.strip(",'") for text in listed for name in text.split()]


def _inside(path: Path) -> str:
    return f" in {_dotted(path[:-1])}" if len(path) > 1 else ""


def _dotted(path: Path) -> str:
    return ".".join(str(step) for step in path)


def _shown(value: Json) -> str:
    if isinstance(value, dict):
        return "keys with values"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "no value"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(schema: Mapping[str, Json], path: Path) -> list[str]:
    """The keys that JSON Schema `schema` knows at `path`."""
    at: Json = dict(schema)
    for step in path:
        inside = _resolve(schema, at)
        properties = inside.get("properties")
        at = properties.get(str(step)) if isinstance(properties, dict) else inside.get("additionalProperties")
    properties = _resolve(schema, at).get("properties")
    return list(properties) if isinstance(properties, dict) else []


def _resolve(schema: Mapping[str, Json], at: Json) -> dict[str, Json]:
    """The object schema behind a reference or a choice between it and null."""
    if not isinstance(at, dict):
        return {}
    choices = at.get("anyOf")
    if isinstance(choices, list) and choices:
        return _resolve(schema, choices[0])
    reference = at.get("$ref")
    if isinstance(reference, str):
        definitions = schema["$defs"]
        assert isinstance(definitions, dict)
        return _resolve(schema, definitions[reference.rsplit("/", 1)[1]])
    return at
