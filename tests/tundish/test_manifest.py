"""What a manifest says of a recipe's paths: nothing of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tundish.manifest import portable_recipe
from tundish.recipe import Recipe, load_recipe, recipe_digest


@pytest.mark.parametrize(
    ("path", "left"),
    [
        ("/home/me/models/tiny", "tiny"),
        ("/home/me/models/tiny/", "tiny"),
        ("~/tiny", "tiny"),
        ("~me", "~me"),
        ("C:\\models\\tiny", "tiny"),
        ("models/tiny", "models/tiny"),
        ("owner/tiny", "owner/tiny"),
        ("sample", "sample"),
    ],
)
def test_of_a_path_the_name_is_left(path: str, left: str) -> None:
    recipe = load_recipe("phi35-all-int4")
    plain: dict[str, Any] = recipe.model_dump(mode="json", exclude_none=True)
    plain["model"] = {"source": path}
    plain["calibration"] = {"source": "text", "text": path}
    made = portable_recipe(Recipe.model_validate(plain))
    assert made.model.source == left and made.calibration.text == left and made.calibration.file is None
    assert Recipe.model_validate(made.model_dump(mode="json", exclude_none=True)) == made
    assert portable_recipe(recipe) == recipe and recipe_digest(portable_recipe(recipe)) == recipe_digest(recipe)


def test_where_a_recipe_lies_does_not_matter(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "r.yaml"
        file.write_text(f"extends: phi35-all-int4\nmodel: {{source: {tmp_path / name / 'tiny'}}}\n")
        digests.add(recipe_digest(portable_recipe(load_recipe(file))))
    assert len(digests) == 1
