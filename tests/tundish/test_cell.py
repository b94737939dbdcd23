"""A cell of a matrix as its process sees it: what is there already, and what it says of a recipe."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporters.base import Target
from exporters.registry import EXPORTERS
from tests.tundish.tiny import INT4, write_recipe
from tundish.cell import Request, run
from tundish.events import Events
from tundish.recipe_errors import MisfitError

TELL_NOBODY = Events(lambda event: None)


def request(task: str, recipe: Path, checkpoint: Path) -> Request:
    return Request(task, str(checkpoint), None, [str(recipe)], [str(recipe.parent / "out")], 1, False, None)


def test_a_cell_whose_runtime_came_meanwhile_is_built_anew(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, schemes=INT4)

    def needs(module: str) -> None:
        monkeypatch.setattr(EXPORTERS[Target.GGUF], "runtime_requires", (module,))

    def stands() -> dict[str, Any]:
        (cell,) = run(request("survey", recipe, checkpoint), TELL_NOBODY)["cells"]
        return dict(cell)

    needs("no_such_runtime")
    assert stands()["why"] == "no build there"
    manifest = run(request("build", recipe, checkpoint), TELL_NOBODY)["manifest"]
    assert manifest["verification"]["gguf"]["passed"] is None
    assert {*stands()} == {"manifest"}, "a new build could not verify it either"
    needs("json")
    assert {*stands()} == {"memory", "calibration", "why"}
    assert stands()["why"] == "the build there is not verified as the recipe asks"


def test_why_a_cell_is_built(checkpoint: Path, tmp_path: Path) -> None:
    model, changes = tmp_path / "model", {"targets": {"gguf": {}}, "verify": {"enabled": False}}
    shutil.copytree(checkpoint, model)
    recipe = write_recipe(tmp_path / "r.yaml", model, **changes)

    def why(**asked: object) -> str:
        (cell,) = run(replace(request("survey", recipe, model), **asked), TELL_NOBODY)["cells"]  # type: ignore[arg-type]
        return str(cell["why"])

    run(request("build", recipe, model), TELL_NOBODY)
    assert why(fresh=True) == "--fresh"
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    assert why() == "the build there is of other files: generation_config.json"
    write_recipe(recipe, model, schemes=INT4, **changes)
    assert why() == "the build there is of another recipe"
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tundish": "', '"tundish": "0.'))
    assert why().startswith("the build there is by tundish 0.")


def test_a_misfit_names_the_key_and_no_copy_of_the_recipe(checkpoint: Path, tmp_path: Path) -> None:
    calibration = {"source": "text", "sequences": 1, "length": 1024}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, schemes=INT4, calibration=calibration)
    with pytest.raises(MisfitError, match=r"\(calibration\.length\)") as caught:
        run(request("build", recipe, checkpoint), TELL_NOBODY)
    (cell,) = run(request("survey", recipe, checkpoint), TELL_NOBODY)["cells"]
    assert cell == {"status": 2, "message": str(caught.value)}
