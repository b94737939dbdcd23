"""What matrices cost is found once for each key: a plan's serves the build, and other budgets of the same model."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.source import Source, source_digest
from tests.tundish.tiny import QUIET, write_recipe
from tundish import budget, cost_cache
from tundish.budget import Assignment
from tundish.cache import collect, costs, entries
from tundish.cost_cache import CostMemory
from tundish.job import Choices, build, plan_job
from tundish.model import open_model
from tundish.recipe import load_recipe
from tundish.settle import settle_schemes

RANDOM = {"source": "random-tokens", "tokens": 16}
FINDERS = ("estimate_costs", "measure_sensitivity")


def telling(find: Callable[..., Any], told: list[str]) -> Callable[..., Any]:
    def tell(*arguments: Any, **names: Any) -> Any:
        told.append(find.__name__)
        return find(*arguments, **names)

    return tell


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for every time that costs are found."""
    told: list[str] = []
    for name in FINDERS:
        monkeypatch.setattr(budget, name, telling(getattr(budget, name), told))
    return told


def recipe(folder: Path, checkpoint: Path, size: str = "5.5bpw", **changes: Any) -> Path:
    own: dict[str, Any] = {"size": size, "schemes": ["int8_g32"]}
    own |= {key: changes.pop(key) for key in ("sensitivity", "schemes", "fixed") if key in changes}
    keys: dict[str, Any] = {"schemes": {"default": "int4_g32"}, "calibration": RANDOM, "targets": {"gguf": {}}}
    return write_recipe(folder / "r.yaml", checkpoint, **keys | {"budget": own} | changes)


def settled(path: Path, fresh: bool = False) -> tuple[Assignment, list[str]]:
    """The assignment, and what was said."""
    made = load_recipe(path)
    folder = Path(made.model.source)
    said: list[str] = []
    memory = CostMemory(lambda: source_digest(folder), fresh, said.append)
    model = open_model(Source("tiny", folder), made)
    _, assignment = settle_schemes(model, made, memory, lambda *what: None, lambda amount: None)
    assert assignment is not None
    return assignment, said


def test_the_build_after_a_plan_does_not_find_them_again(checkpoint: Path, tmp_path: Path, runs: list[str]) -> None:
    path = recipe(tmp_path, checkpoint)
    planned = plan_job(Choices(str(path), verify=False))[1].assignment
    assert planned is not None and len(runs) == 1
    manifest = build(Choices(str(path), out=tmp_path / "out", verify=False), QUIET)
    assert manifest["budget"] == planned.as_dict() and len(runs) == 1
    build(Choices(str(path), out=tmp_path / "out", verify=False, fresh=True), QUIET)
    assert len(runs) == 2 and len(list(costs().iterdir())) == 1


@pytest.mark.parametrize("sensitivity", ["estimated", "measured"])
def test_they_are_the_same_when_kept(checkpoint: Path, tmp_path: Path, runs: list[str], sensitivity: str) -> None:
    path = recipe(tmp_path, checkpoint, sensitivity=sensitivity)
    first, said = settled(path)
    again, told = settled(path)
    (entry,) = entries()
    assert again == first and len(runs) == 1 and not said
    assert told == [f"what matrices cost: cached ({entry.key} of `tundish cache ls`)"]
    assert (entry.kind, entry.model, entry.method, entry.text) == ("costs", "tiny", sensitivity, "random tokens")


def test_other_budgets_share_them(checkpoint: Path, tmp_path: Path, runs: list[str]) -> None:
    small, _ = settled(recipe(tmp_path, checkpoint))
    large, _ = settled(recipe(tmp_path, checkpoint, "7bpw"))
    assert len(runs) == 1 and small.sensitivity == large.sensitivity and large.chosen.kl < small.chosen.kl
    alone, _ = settled(recipe(tmp_path, checkpoint, "7bpw"), fresh=True)
    assert alone == large


def test_anything_that_matters_makes_another_key(
    checkpoint: Path, tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settled(recipe(tmp_path, checkpoint))
    text = {"source": "text", "text": str(Path(__file__).resolve().parents[2] / "LICENSE")}
    cases: list[dict[str, Any]] = [
        {"sensitivity": "measured"},
        {"schemes": ["int8_g32", "int4_g64"]},
        {"fixed": ["lm_head"]},
        {"calibration": RANDOM | {"seed": 1}},
        {"calibration": text},
        {"calibration": {"source": "none"}},
    ]
    for count, changes in enumerate(cases, 2):
        settled(recipe(tmp_path, checkpoint, **changes))
        assert len(runs) == len(list(costs().iterdir())) == count, changes
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    weights = next(other.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    settled(recipe(tmp_path, other))
    monkeypatch.setattr(cost_cache, "COSTS_VERSION", 1000)
    settled(recipe(tmp_path, checkpoint))
    assert len(runs) == len(cases) + 3


def test_damage_is_told_and_made_good(checkpoint: Path, tmp_path: Path, runs: list[str]) -> None:
    path = recipe(tmp_path, checkpoint)
    first, _ = settled(path)
    (folder,) = costs().iterdir()
    index = folder / "index.json"
    text = index.read_text()
    digit = text.index('"costs"') + text[text.index('"costs"') :].index("e-") - 1
    index.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    assert [each.model for each in entries()] == ["damaged"]
    again, said = settled(path)
    assert again == first and len(runs) == 2 and any(line.startswith("damaged: index.json") for line in said), said
    settled(path)
    assert len(runs) == 2, "mended"


def test_gc_removes_them(checkpoint: Path, tmp_path: Path, runs: list[str]) -> None:
    path = recipe(tmp_path, checkpoint)
    settled(path)
    removed, used = collect(0, 1e12, lambda text: None)
    assert ([each.kind for each in removed], used, list(costs().iterdir())) == (["costs"], [], [])
    settled(path)
    assert len(runs) == 2


def test_a_cache_that_takes_nothing_is_done_without(
    checkpoint: Path, tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, checkpoint)
    first, _ = settled(path)
    collect(0, 1e12, lambda text: None)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cost_cache, "write_index", full)
        again, said = settled(path)
        assert again == first and any("is not kept" in line and "No space" in line for line in said), said
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNDISH_CACHE", str(tmp_path / "file" / "cache"))
    again, said = settled(path)
    assert again == first and any(line.startswith("warning") for line in said) and len(runs) == 3
