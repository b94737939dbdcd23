"""The file of `tundish matrix`: which cells it comes to, and what is told of mistakes in it."""

from __future__ import annotations

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
        ("models: 3\nrecipes: [x]\n", 1, "wrong value for models.*expected a list"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        cells(tmp_path, text)
    assert f"m.yaml:{line})" in str(caught.value)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"2 problems in the matrix: \(1\).*'nope'.*\(2\).*'neither'"):
        cells(tmp_path, "models: [sample]\nrecipes:\n- nope\n- neither\n")
