"""The packaged recipes: where they lie, what they are called, and a row of each for people to choose from.

Light on purpose: a listing reads the files and checks nothing but what it shows, so it loads no pydantic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import recipes as packaged
from exporters.target import Target
from tundish.recipe_yaml import SUFFIX, Files, Problem, resolve

LIBRARY = Path(packaged.__file__).parent
NOT_INHERITED = frozenset({"name"})


@dataclass(frozen=True, slots=True)
class Summary:
    """What a listing says of a recipe, as its files state it. `scheme` is the default one."""

    name: str
    device: str
    targets: tuple[Target, ...]
    scheme: str
    context: int | str
    description: str


def recipe_names() -> list[str]:
    """The names of the packaged recipes, sorted."""
    return sorted(path.stem for path in LIBRARY.glob(f"*{SUFFIX}"))


def summaries() -> Iterator[Summary]:
    """A summary of every packaged recipe, by name. UsageError tells the mistakes of one that has none to show."""
    files: Files = {}
    for name in recipe_names():
        path = LIBRARY / (name + SUFFIX)
        yield _summary(path, files) or _checked(path)


def _summary(path: Path, files: Files) -> Summary | None:
    """None if a key that a listing shows is absent or of the wrong kind, or the file has a mistake of its own."""
    problems: list[Problem] = []
    match resolve(path, LIBRARY, NOT_INHERITED, problems, files).plain():
        case {
            "device": str(device),
            "targets": dict(targets),
            "schemes": {"default": str(scheme)},
            "context": int() | str() as context,
            "description": str(description),
        } if not problems and targets.keys() <= set(Target):
            made = tuple(target for target in Target if target in targets)
            return Summary(path.stem, device, made, scheme, context, description)
    return None


def _checked(path: Path) -> Summary:
    """The summary of a recipe that is checked in full: this raises what is wrong with it."""
    from tundish.recipe import load_recipe

    recipe = load_recipe(path)
    return Summary(
        recipe.name,
        recipe.device.value,
        tuple(recipe.targets),
        recipe.schemes.default.name,
        recipe.context,
        recipe.description,
    )
