"""Recipe files as text: YAML read with the line of every key, and `extends` resolved. Knows no recipe key but that one.

    child.yaml --extends--> base.yaml --extends--> ...      merged from the far end, each file over the one it extends

Mappings are merged key by key, lists and single values replaced; a null removes what is inherited. Every value keeps
the file and line of its own key, so that a mistake is reported where it was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from converters.errors import UsageError
from converters.json_file import regular_size

# A recipe is a screen of text; these limits only stop files that are not recipes, or that expand without end.
MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_VALUES = 10_000

SUFFIX = ".yaml"
YAML_TAG = "tag:yaml.org,2002:"

Plain = str | int | float | bool | None
Json = Plain | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, slots=True)
class Where:
    """A line of a file, counted from 1. Prints as `file:line`."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Located:
    """A YAML value with the line of its key; in a list its own line, for a whole file the first one."""

    value: Plain | tuple[Located, ...] | Mapping[str, Located]
    where: Where

    def plain(self) -> Json:
        """The value without its lines."""
        if isinstance(self.value, Mapping):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, tuple):
            return [entry.plain() for entry in self.value]
        return self.value


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a recipe, with the parts of a TundishError."""

    what: str
    where: Where
    expected: str | None = None
    found: str | None = None
    mend: str | None = None

    def error(self) -> UsageError:
        return UsageError(self.what, where=str(self.where), expected=self.expected, found=self.found, mend=self.mend)


@dataclass(frozen=True, slots=True)
class File:
    """A recipe file by itself: its values, what is wrong with them, and the file it extends."""

    resolved: Path
    entries: Mapping[str, Located]
    start: Where
    problems: tuple[Problem, ...]
    base: Path | None


Files = dict[Path, File]
"""The files that a call has read so far: recipes share their bases, and each is parsed once."""


def raise_all(problems: list[Problem], kind: str = "recipe") -> None:
    """Raise one UsageError that tells every problem, in the order of files and lines; nothing if there is none.

    `kind`: what the file is called.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0].error()
    ordered = sorted(dict.fromkeys(problems), key=lambda problem: (problem.where.file, problem.where.line))
    told = [f"({number}) {problem.error()}" for number, problem in enumerate(ordered, 1)]
    raise UsageError(f"{len(ordered)} problems in the {kind}: " + " ".join(told))


def display(path: Path) -> str:
    """A path as messages show it: relative to the working directory if it lies inside."""
    absolute = path.resolve()
    here = Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


def read_yaml(path: Path, problems: list[Problem], kind: str = "recipe") -> Located:
    """The mapping in a YAML file. Duplicate keys and odd values go to `problems`; UsageError if it cannot be parsed.

    `kind`: what the file is called.
    """
    file = display(path)
    text = _read_text(path, file, kind)
    try:
        root = bounded_parser().compose(text)
    except MaxDepthExceededError as error:
        raise _too_deep(Where(file, error.problem_mark.line + 1), kind) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise Problem(f"not valid YAML: {error.problem or error.context}", Where(file, line)).error() from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"U+{ord(text[error.position]):04X}"
        raise Problem("not valid YAML: control character", Where(file, line), found=found).error() from error
    except YAMLError as error:
        raise Problem(f"not valid YAML: {error}", Where(file, 1)).error() from error
    start = Where(file, 1)
    if root is None:
        return Located({}, start)
    if not isinstance(root, MappingNode):
        raise Problem(f"not a {kind}", start, expected="lines of `key: value`", found=_kind(root)).error()
    return _Reader(file, problems, kind).read(root, start, 0)


def merge(base: Located, over: Located, problems: list[Problem]) -> Located:
    """`over` laid over `base`. A null that has nothing to remove goes to `problems`: it is a forgotten value."""
    if not isinstance(over.value, Mapping):
        return over
    merged = dict(base.value) if isinstance(base.value, Mapping) else {}
    for key, entry in over.value.items():
        if entry.value is not None:
            merged[key] = merge(merged.get(key, Located(None, entry.where)), entry, problems)
        elif key in merged:
            del merged[key]
        else:
            problems.append(
                Problem(
                    f"{key!r} has no value",
                    entry.where,
                    mend="Write {} if it is to hold the defaults; no value removes an inherited key, and none is.",
                )
            )
    return Located(merged, over.where)


def resolve(path: Path, library: Path, not_inherited: frozenset[str], problems: list[Problem], files: Files) -> Located:
    """The file at `path` merged over everything it extends, directly or not. What it reads is kept in `files`.

    A base is looked up beside the file that names it, then in `library`. Keys in `not_inherited` count only in the
    file at `path`. UsageError if a base is missing or the files extend one another in a circle.
    """
    chain: list[File] = []
    merged: list[Located] = []
    current: Path | None = path
    while current is not None:
        if current not in files:
            files[current] = _read_file(current, library)
        file = files[current]
        if file.resolved in [link.resolved for link in chain]:
            raise _circle(chain, file.resolved)
        problems += file.problems
        skipped = not_inherited if chain else frozenset[str]()
        own = {key: entry for key, entry in file.entries.items() if key != "extends" and key not in skipped}
        merged.append(Located(own, file.start))
        chain.append(file)
        current = file.base
    result = Located({}, chain[-1].start)
    for located in reversed(merged):
        result = merge(result, located, problems)
    return result


def _read_file(path: Path, library: Path) -> File:
    problems: list[Problem] = []
    located = read_yaml(path, problems)
    assert isinstance(located.value, Mapping)
    resolved = path.resolve()
    extends = located.value.get("extends")
    base = None if extends is None else _base(extends, path, resolved, library)
    return File(resolved, located.value, located.where, tuple(problems), base)


def _base(extends: Located, path: Path, resolved: Path, library: Path) -> Path:
    name = extends.value
    if not isinstance(name, str) or not name or "\0" in name:
        found = repr(extends.plain())
        raise Problem("wrong value for extends", extends.where, "the name or path of a recipe", found).error()
    file = name if name.endswith((SUFFIX, ".yml")) else name + SUFFIX
    candidates = [path.parent / file, library / file]
    try:
        found_paths = [candidate for candidate in candidates if candidate.is_file()]
    except OSError as error:  # a name that is too long for one
        raise Problem("extends no name of a file", extends.where, found=error.strerror or str(error)).error() from error
    if not found_paths:
        tried = " or ".join(dict.fromkeys(display(candidate) for candidate in candidates))
        raise Problem(f"extends a recipe that does not exist: {name!r}", extends.where, f"a file {tried}").error()
    # A recipe may extend the packaged one of its own name: the file itself is its own base only where no other is.
    return next((candidate for candidate in found_paths if candidate.resolve() != resolved), found_paths[0])


def _circle(chain: list[File], back: Path) -> UsageError:
    links = [link.resolved for link in chain]
    shown = " -> ".join(display(link) for link in [*links[links.index(back) :], back])
    where = chain[-1].entries["extends"].where
    return Problem("recipes extend one another in a circle", where, found=shown).error()


def _read_text(path: Path, file: str, kind: str) -> str:
    try:
        regular_size(path)
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read the {kind}: {error.strerror or error}", where=file) from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"not a {kind}", where=file, expected=f"at most {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Problem("not UTF-8 text", Where(file, line), found=f"byte 0x{data[error.start]:02x}").error() from error


def bounded_parser() -> YAML:
    """Refuses what nests deeper than MAX_DEPTH. For composing: it gives nodes."""
    parser = YAML(typ="safe", pure=True)  # the C parser gives no composed nodes
    parser.max_depth = MAX_DEPTH + 1  # composing recurses once a level; a value counts as one, and _Reader is exact
    return parser


@cache
def _constructor() -> SafeConstructor:
    return SafeConstructor(loader=bounded_parser())


def _too_deep(where: Where, kind: str) -> UsageError:
    return Problem(f"not a {kind}", where, expected=f"at most {MAX_DEPTH} levels of nesting").error()


def _kind(node: Node) -> str:
    return {"ScalarNode": "a single value", "SequenceNode": "a list"}.get(type(node).__name__, "a mapping")


@dataclass(slots=True)
class _Reader:
    """Turns composed nodes into Located values, counting them: aliases may expand a short file without end."""

    file: str
    problems: list[Problem]
    kind: str
    count: int = 0

    def read(self, node: Node, where: Where, depth: int) -> Located:
        self.count += 1
        if self.count > MAX_VALUES:
            raise Problem(
                f"not a {self.kind}", where, expected=f"at most {MAX_VALUES} values, aliases included"
            ).error()
        if depth >= MAX_DEPTH and not isinstance(node, ScalarNode):
            raise _too_deep(where, self.kind)
        kind = str(node.tag).removeprefix(YAML_TAG)
        if not isinstance(node, ScalarNode) and kind not in ("map", "seq"):
            self.problems.append(Problem(f"unknown YAML tag {node.tag}", where, expected="a plain value"))
        if isinstance(node, MappingNode):
            return Located(dict(self._entries(node, depth)), where)
        if isinstance(node, SequenceNode):
            entries = (self.read(item, self._line(item), depth + 1) for item in node.value)
            return Located(tuple(entries), where)
        assert isinstance(node, ScalarNode)
        return Located(self._scalar(node, where), where)

    def _entries(self, node: MappingNode, depth: int) -> Iterator[tuple[str, Located]]:
        first: dict[str, Where] = {}
        for key_node, value_node in node.value:
            where = self._line(key_node)
            if not isinstance(key_node, ScalarNode):
                self.problems.append(Problem("not a key", where, expected="text", found=_kind(key_node)))
                continue
            key = str(key_node.value)
            if key in first:
                found = f"it first in line {first[key].line}"
                self.problems.append(Problem(f"duplicate key {key!r}", where, expected="each key once", found=found))
                continue
            first[key] = where
            yield key, self.read(value_node, where, depth + 1)

    def _scalar(self, node: ScalarNode, where: Where) -> Plain:
        text = str(node.value)
        kind = str(node.tag).removeprefix(YAML_TAG)
        if kind in ("str", "timestamp"):  # a date is no recipe value, but may well be a branch name
            return text
        if kind not in ("int", "float", "bool", "null"):
            self.problems.append(Problem(f"unknown YAML tag {node.tag}", where, expected="a plain value"))
            return text
        try:
            value = _constructor().construct_non_recursive_object(node)
        except (ValueError, KeyError, IndexError):  # what the constructors raise on text that is not of their kind
            shown = repr(text) if len(text) <= 60 else f"{text[:40]!r} and {len(text) - 40} characters more"
            self.problems.append(Problem(f"not a value of YAML's type {kind}", where, found=shown))
            return text
        assert value is None or isinstance(value, bool | int | float)
        return value

    def _line(self, node: Node) -> Where:
        return Where(self.file, node.start_mark.line + 1)
