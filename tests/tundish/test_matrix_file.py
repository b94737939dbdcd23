"""The file of `tundish matrix`: which cells it comes to, and what is told of mistakes in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converters.errors import UsageError
from tundish.matrix_file import load_matrix


def cells(folder: Path, text: str) -> list[str]:
    (folder / "m.yaml").write_text(text)
    return [cell.name for cell in load_matrix(folder / "m.yaml").cells]


def test_every_model_with_every_recipe(tmp_path: Path) -> None:
    text = (
        "models: [sample, {source: org/repo, revision: v1, name: other}]\nrecipes: [phi35-mac-int4, phi35-all-fp16]\n"
    )
    assert cells(tmp_path, text) == [
        "sample/phi35-mac-int4", "sample/phi35-all-fp16", "other/phi35-mac-int4", "other/phi35-all-fp16",
    ]  # fmt: skip
    matrix = load_matrix(tmp_path / "m.yaml")
    assert matrix.out is None
    assert {cell.model.revision for cell in matrix.cells if cell.model.title == "other"} == {"v1"}


def test_exclude_and_include_as_ci_has_them(tmp_path: Path) -> None:
    text = """
models: [sample, org/big]
recipes: [phi35-mac-int4, phi35-all-fp16]
exclude:
  - {model: org/big, recipe: phi35-all-fp16}
  - recipe: phi35-mac-int4
include:
  - {model: big, recipe: phi35-mac-int8}
  - {model: org/third, recipe: phi35-mac-int4}
out: some/where
"""
    assert cells(tmp_path, text) == ["sample/phi35-all-fp16", "big/phi35-mac-int8", "third/phi35-mac-int4"]
    matrix = load_matrix(tmp_path / "m.yaml")
    assert matrix.out == Path("some/where")
    assert matrix.cells[1].model.source == "org/big"


def test_a_recipe_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: phi35-mac-int4\n")
    mine = tmp_path / "mine.yaml"
    assert cells(
        tmp_path, f"models: [sample, org/x]\nrecipes: ['{mine}']\nexclude: [{{model: x, recipe: mine}}]\n"
    ) == ["sample/mine"]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("models: [sample]\nrecipes: [phi35-mac-int5]\n", 2, "unknown recipe 'phi35-mac-int5'"),
        ("models: [sample]\nrecipe: [phi35-mac-int4]\n", 2, "unknown key 'recipe'.*Did you mean recipes"),
        ("models:\n- source: sample\n  version: 1\nrecipes: [phi35-mac-int4]\n", 3, "unknown key 'version'"),
        ("models: [a/x, b/x]\nrecipes: [phi35-mac-int4]\n", 2, "two models are called x.*Give one a `name`"),
        ("models: [a/x]\nrecipes:\n- phi35-mac-int4\n- phi35-mac-int4\n", 4, "x/phi35-mac-int4 is there twice"),
        ("models: [{source: a/x, name: ../x}]\nrecipes: [phi35-mac-int4]\n", 1, "name.*expected the name of a folder"),
        ("models: [a/x]\nrecipes: [phi35-mac-int4]\nexclude: [{model: y}]\n", 3, "exclusion of a model that is not"),
        ("models: [a/x]\nrecipes: [phi35-mac-int4]\nexclude:\n- recipe: y\n", 4, "exclusion of a recipe that is not"),
        ("models: [a/x]\nrecipes: [phi35-mac-int4]\nexclude: [{}]\n", 3, "an exclusion of nothing"),
        ("models: [a/x]\n", 1, "a matrix without a cell"),
        ("- sample\n", 1, "not a matrix"),
        ('models:\n- "a\\0b"\nrecipes: [phi35-mac-int4]\n', 2, "wrong value for models.0.*null"),
        ("models:\n- ~nobody-of-this-name/x\nrecipes: [phi35-mac-int4]\n", 2, "wrong value for models.0.*home"),
        ("models: [sample]\nrecipes:\n- ~nobody-of-this-name/x.yaml\n", 3, "no such recipe file.*home"),
        ('models: [sample]\nrecipes:\n- "./a\\0b.yaml"\n', 3, "no such recipe file"),
        ("models: [a/Straße, b/STRASSE]\nrecipes: [phi35-mac-int4]\n", 2, "two models are called STRASSE"),
        ('models: [a/é, "b/e\\u0301"]\nrecipes: [phi35-mac-int4]\n', 2, "two models are called"),
        ("models: [/]\nrecipes: [phi35-mac-int4]\n", 2, "a model without a name"),
        ("models: 3\nrecipes: [x]\n", 1, "wrong value for models.*expected a list"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        cells(tmp_path, text)
    assert f"m.yaml:{line})" in str(caught.value)


@pytest.mark.parametrize(
    "name", [".", "..", " ", ".a", "a/b", r"a\\b", r"a\nb", r"a\x7f", r"a\0", r"a\ud800", "a" * 256, "é" * 128]
)
def test_names_that_no_folder_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"models\.0\.name \(.*m\.yaml:2\); expected the name of a folder"):
        cells(tmp_path, f'models:\n- {{source: a/x, name: "{name}"}}\nrecipes: [phi35-mac-int4]\n')


@pytest.mark.parametrize("file", ["..yaml", "...yaml", ".a.yaml", "a\tb.yaml"])
def test_recipe_files_that_name_no_folder(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("extends: phi35-mac-int4\n")
    recipe = json.dumps(str(tmp_path / file))
    with pytest.raises(UsageError, match=r"names no folder \(.*m\.yaml:3\).*Rename its file"):
        cells(tmp_path, f"models: [a/x]\nrecipes:\n- {recipe}\n")


def test_recipes_that_some_file_systems_take_for_one(tmp_path: Path) -> None:
    for name in ("Mine", "mine"):
        (tmp_path / f"{name}.yaml").write_text("extends: phi35-mac-int4\n")
    recipes = [str(tmp_path / f"{name}.yaml") for name in ("Mine", "mine")]
    with pytest.raises(UsageError, match="x/mine is there twice, also as x/Mine"):
        cells(tmp_path, f"models: [a/x]\nrecipes: {recipes}\n")


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"2 problems in the matrix: \(1\).*'nope'.*\(2\).*'neither'"):
        cells(tmp_path, "models: [sample]\nrecipes:\n- nope\n- neither\n")
