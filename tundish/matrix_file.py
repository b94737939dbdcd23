"""The file of `tundish matrix`: models and recipes, each with each, as CI services write such a matrix.

models: [sample, ./checkpoint, {name: phi, source: microsoft/Phi-3.5-mini-instruct, revision: main}]
recipes: [phi35-mobile-int4, ./mine.yaml]
exclude: [{model: sample, recipe: mine}]      every pair that has all that an entry says is left out
include: [{model: phi, recipe: phi35-all-fp16}]     pairs beside these, after `exclude`
out: dist/nightly
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from converters.errors import UsageError
from tundish.folder_name import EXPECTED, folded, is_folder_name
from tundish.recipe import Recipe, load_recipe, recipe_name
from tundish.recipe_errors import locate, problems_of
from tundish.recipe_yaml import Located, Problem, raise_all, read_yaml

KIND = "matrix"


def _folder_name(name: str) -> str:
    if not is_folder_name(name):
        raise ValueError(EXPECTED)
    return name


def _place(source: str) -> str:
    try:
        path = Path(source).expanduser()
        path.is_dir()
        path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # the home folder of nobody, a NUL, a name too long
        raise ValueError(f"a Hugging Face id, the path of a folder, or 'sample' ({error})") from error
    return source


Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, AfterValidator(_folder_name)]
Place = Annotated[Text, AfterValidator(_place)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MatrixModel(_Part):
    """A checkpoint, and what its folder of results and its rows are called."""

    source: Place = Field(description="a Hugging Face id, the path of a folder, or 'sample'")
    revision: Text | None = Field(default=None, description="branch, tag or commit of a Hugging Face id")
    name: Name | None = Field(default=None, description="by default the last part of the source")

    @property
    def title(self) -> str:
        """The name, or the last part of the source."""
        return self.name or Path(self.source).expanduser().resolve().name


class _Exclude(_Part):
    model: Text | None = None
    recipe: Text | None = None


def _spelled_out(model: object) -> object:
    return {"source": model} if isinstance(model, str) else model


Model = Annotated[MatrixModel, BeforeValidator(_spelled_out, json_schema_input_type=MatrixModel | str)]


class _Include(_Part):
    model: Model
    recipe: Text


class _Matrix(_Part):
    models: tuple[Model, ...] = ()
    recipes: tuple[Text, ...] = ()
    exclude: tuple[_Exclude, ...] = ()
    include: tuple[_Include, ...] = ()
    out: Text | None = Field(default=None, description="folder; each build goes to <out>/<model>/<recipe>")


@dataclass(frozen=True, slots=True)
class Cell:
    """One build of a matrix."""

    model: MatrixModel
    recipe: Recipe

    @property
    def name(self) -> str:
        """What messages call it, and its folder within the matrix's."""
        return f"{self.model.title}/{self.recipe.name}"


@dataclass(frozen=True, slots=True)
class Matrix:
    """The cells in the order of the file, models first, and the folder that it names."""

    cells: tuple[Cell, ...]
    out: Path | None


def load_matrix(path: Path) -> Matrix:
    """The matrix in a YAML file, its recipes loaded. One UsageError tells every mistake, each with `file:line`."""
    problems: list[Problem] = []
    located = read_yaml(path, problems, KIND)
    try:
        matrix = _Matrix.model_validate(located.plain())
    except ValidationError as error:
        raise_all(problems + problems_of(error, located, _Matrix.model_json_schema()), KIND)
        raise  # problems_of has told at least one
    known = {model.title: model for model in matrix.models}
    asked = [*_product(matrix, located, known), *_included(matrix, located, known)]
    problems += _ambiguous([(model, at) for model, _, at in asked])
    recipes = _recipes(asked, problems)
    cells: dict[str, Cell] = {}  # by what tells their folders apart
    for model, recipe, at in asked:
        if recipe not in recipes:
            continue
        cell = Cell(model, recipes[recipe])
        key = f"{folded(model.title)}/{folded(cell.recipe.name)}"
        if key in cells:
            also = "" if cells[key].name == cell.name else f", also as {cells[key].name}"
            problems.append(Problem(f"{cell.name} is there twice{also}", at.where, mend="Leave one of the two out."))
        cells[key] = cell
    if not asked:
        expected = "models and recipes, or include"
        problems.append(Problem("a matrix without a cell", located.where, expected))
    raise_all(problems, KIND)
    return Matrix(tuple(cells.values()), Path(matrix.out) if matrix.out else None)


Asked = tuple[MatrixModel, str, Located]  # a pair, and the entry of the file that asks for it


def _product(matrix: _Matrix, located: Located, known: dict[str, MatrixModel]) -> Iterator[Asked]:
    """Every model with every recipe, but for those excluded. UsageError if an exclusion names what is not there."""
    for index, entry in enumerate(matrix.exclude):
        at = locate(located, ("exclude", index))[0]
        if entry.model is None and entry.recipe is None:
            raise Problem("an exclusion of nothing", at.where, "model, recipe or both").error()
        if entry.model is not None and not any(_is_model(entry.model, model) for model in matrix.models):
            raise Problem("exclusion of a model that is not there", at.where, ", ".join(known), entry.model).error()
        if entry.recipe is not None and not any(_is_recipe(entry.recipe, recipe) for recipe in matrix.recipes):
            expected = ", ".join(matrix.recipes)
            raise Problem("exclusion of a recipe that is not there", at.where, expected, entry.recipe).error()
    for model in matrix.models:
        for index, recipe in enumerate(matrix.recipes):
            excluded = any(
                (entry.model is None or _is_model(entry.model, model))
                and (entry.recipe is None or _is_recipe(entry.recipe, recipe))
                for entry in matrix.exclude
            )
            if not excluded:
                yield model, recipe, locate(located, ("recipes", index))[0]


def _included(matrix: _Matrix, located: Located, known: dict[str, MatrixModel]) -> Iterator[Asked]:
    """The pairs of `include`; a model there may be the name of one of `models`."""
    for index, entry in enumerate(matrix.include):
        named = known.get(entry.model.source) if entry.model.name is None and entry.model.revision is None else None
        yield named or entry.model, entry.recipe, locate(located, ("include", index))[0]


def _is_model(name: str, model: MatrixModel) -> bool:
    return name in (model.title, model.source)


def _is_recipe(name: str, recipe: str) -> bool:
    return name in (recipe, recipe_name(recipe))


def _ambiguous(asked: list[tuple[MatrixModel, Located]]) -> Iterator[Problem]:
    """A problem for every model whose name another has, or that has none."""
    first: dict[str, MatrixModel] = {}
    for model, at in asked:
        if not is_folder_name(model.title):
            yield Problem("a model without a name", at.where, EXPECTED, repr(model.source), "Give it a `name`.")
            continue
        other = first.setdefault(folded(model.title), model)
        if other != model:
            found = f"{other.source} and {model.source}"
            yield Problem(f"two models are called {model.title}", at.where, found=found, mend="Give one a `name`.")


def _recipes(asked: list[Asked], problems: list[Problem]) -> dict[str, Recipe]:
    """Each recipe by what the file calls it. What is wrong with one goes to `problems`, at the line that names it."""
    recipes: dict[str, Recipe] = {}
    failed: set[str] = set()
    for _, name, at in asked:
        if name in recipes or name in failed:
            continue
        try:
            recipe = load_recipe(name)
        except UsageError as error:
            failed.add(name)
            problems.append(Problem(f"recipe {name}: {error}".rstrip("."), at.where))
            continue
        if is_folder_name(recipe.name):
            recipes[name] = recipe
        else:
            failed.add(name)
            mend = "Rename its file."
            problems.append(Problem(f"recipe {name!r} names no folder", at.where, EXPECTED, repr(recipe.name), mend))
    return recipes
