"""A cell of a matrix as its process sees it: what is there already, and what it says of a recipe."""

from __future__ import annotations

from pathlib import Path

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

    def stands() -> set[str]:
        (cell,) = run(request("survey", recipe, checkpoint), TELL_NOBODY)["cells"]
        return {*cell}

    needs("no_such_runtime")
    manifest = run(request("build", recipe, checkpoint), TELL_NOBODY)["manifest"]
    assert manifest["verification"]["gguf"]["passed"] is None
    assert stands() == {"manifest"}, "a new build could not verify it either"
    needs("json")
    assert stands() == {"memory", "calibration"}


def test_a_misfit_names_the_key_and_no_copy_of_the_recipe(checkpoint: Path, tmp_path: Path) -> None:
    calibration = {"source": "text", "sequences": 1, "length": 1024}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, schemes=INT4, calibration=calibration)
    with pytest.raises(MisfitError, match=r"\(calibration\.length\)") as caught:
        run(request("build", recipe, checkpoint), TELL_NOBODY)
    (cell,) = run(request("survey", recipe, checkpoint), TELL_NOBODY)["cells"]
    assert cell == {"status": 2, "message": str(caught.value)}
