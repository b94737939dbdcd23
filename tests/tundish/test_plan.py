"""The plan: what memory it counts, and what it refuses."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from converters.errors import UsageError
from converters.quantize.stream import ROOM
from converters.source import Source
from exporters.base import Model
from exporters.registry import EXPORTERS
from tests.tundish.tiny import INT4, QUIET, write_recipe
from tundish.calibration_text import Origin, calibration_sequences
from tundish.job import Choices, build, plan_job
from tundish.model import open_model
from tundish.plan import Plan, make_plan, own_memory, shortage_of
from tundish.recipe import Evaluation, Recipe, load_recipe
from tundish.verify import LONG_TAIL, evaluation_shape, long_length, reference_logits, text_shape

LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
CALIBRATED = {"source": "random-tokens", "tokens": 16}


def opened(checkpoint: Path, folder: Path, **changes: object) -> tuple[Model, Recipe]:
    changes = {"targets": {"gguf": {}}, "schemes": INT4, **changes}
    recipe = load_recipe(write_recipe(folder / "r.yaml", checkpoint, **changes))
    return open_model(Source("tiny", checkpoint), recipe), recipe


def test_only_the_phases_of_the_build_count(checkpoint: Path, tmp_path: Path) -> None:
    model, recipe = opened(checkpoint, tmp_path)
    assert set(make_plan(model, recipe, EXPORTERS).phases) == {"pour", "reference", "comparison"}
    assert set(make_plan(model, recipe, EXPORTERS, verified=False).phases) == {"pour"}
    model, recipe = opened(checkpoint, tmp_path, calibration=CALIBRATED, verify={"enabled": False})
    assert set(make_plan(model, recipe, EXPORTERS).phases) == {"pour", "calibration"}
    matrix = {"source": "imatrix", "file": "i.gguf"}
    model, recipe = opened(checkpoint, tmp_path, calibration=matrix, verify={"enabled": False})
    assert set(make_plan(model, recipe, EXPORTERS).phases) == {"pour"}, "the model reads nothing"
    model, recipe = opened(checkpoint, tmp_path, calibration=CALIBRATED, schemes={"default": "fp16"})
    assert "calibration" not in make_plan(model, recipe, EXPORTERS).phases, "floats are not calibrated"


def test_the_logits_of_verification_are_counted(checkpoint: Path, tmp_path: Path) -> None:
    model, recipe = opened(checkpoint, tmp_path)
    counted = make_plan(model, recipe, EXPORTERS).disk - make_plan(model, recipe, EXPORTERS, verified=False).disk
    beyond = long_length(model)
    assert beyond is not None
    shape = evaluation_shape(recipe, model)
    paths = reference_logits(model, np.zeros(shape, np.int64), tmp_path, "short")
    paths += reference_logits(model, np.zeros((1, beyond), np.int64), tmp_path, "long", LONG_TAIL)
    needed = 2 * sum(path.stat().st_size for path in paths)
    assert needed < counted < needed + (32 << 20)


def test_a_large_model_reads_less_text(checkpoint: Path, tmp_path: Path) -> None:
    model, _ = opened(checkpoint, tmp_path)
    multiplied = sum(
        weight.shape[0] * weight.shape[1] for name, weight in model.graph.weights.items() if len(weight.shape) == 2
    ) - (0 if model.graph.config.tie_embeddings else math.prod(model.graph.weights["embedding"].shape))
    pass_of = 2e-12 * multiplied  # teraflops for one token

    def shape(tokens: float) -> tuple[int, int]:
        return text_shape(Evaluation(sequences=4, length=100, teraflops=tokens * pass_of), model)

    assert shape(1e6) == text_shape(Evaluation(sequences=4, length=100), model) == (4, 100)
    assert (shape(310), shape(190), shape(80)) == ((3, 100), (1, 100), (1, 80))
    assert shape(1) == (1, 64), "so few that a figure would say nothing"


def test_text_is_counted_by_its_tokens_and_fitted_codes_on_the_disk(checkpoint: Path, tmp_path: Path) -> None:
    def planned(method: str, sequences: int) -> Plan:
        calibration = {"source": "text", "sequences": sequences, "length": 64}
        model, recipe = opened(checkpoint, tmp_path, calibration=calibration, method=method, verify={"enabled": False})
        return make_plan(model, recipe, EXPORTERS)

    # A token's gate and up, their product and the residual; the fitted model beside that of floats. And what is kept.
    one, kept = 4 * (2 * 96 + 96 + 64), 2 * 4 * 64
    assert 2001 * 64 * one < ROOM < 2 * 2001 * 64 * one
    for method, streams in (("rtn", 1), ("gptq", 2)):
        few, some, many, more = (planned(method, count) for count in (1, 2001, 16001, 64001))
        assert few.scratch == streams * 64 * kept
        assert some.scratch == 2001 * 64 * streams * (kept if streams == 1 else one + kept)
        assert many.scratch == 16001 * 64 * streams * (one + kept)
        assert many.disk == max(many.written, many.scratch) + many.kept
        assert few.phases["calibration"] + ROOM < many.phases["calibration"] < few.phases["calibration"] + 4 * ROOM
        assert more.phases["calibration"] - many.phases["calibration"] < 64 << 20, "the rest is on the disk"
    planned("gptq+signround", 1)  # loads kernels
    refining = planned("gptq+signround", 1).phases["calibration"] - planned("gptq", 1).phases["calibration"]
    assert refining == pytest.approx(48 << 20, rel=0.1), "twelve arrays of four megabytes"
    model, recipe = opened(checkpoint, tmp_path)
    codes = sum(
        math.prod(weight.shape) + 2 * weight.shape[0] * weight.shape[1] // 32
        for weight in model.graph.weights.values()
        if len(weight.shape) == 2 and weight.name != "embedding"
    )
    plain = make_plan(model, recipe, EXPORTERS, verified=False).disk
    assert planned("rtn", 1).disk == planned("gptq", 1).with_cached_calibration().disk == plain
    assert (
        planned("gptq", 1).disk - plain == pytest.approx(codes, rel=0.05) and planned("gptq", 1).disk >= plain + codes
    )


def test_a_calibration_too_large_for_the_disk_says_what_to_lower(checkpoint: Path, tmp_path: Path) -> None:
    calibration = {"source": "text", "sequences": 1 << 30, "length": 64}
    model, recipe = opened(checkpoint, tmp_path, calibration=calibration, method="gptq")
    told = str(shortage_of(make_plan(model, recipe, EXPORTERS), tmp_path / "out"))
    assert "not enough disk" in told and "lower calibration.sequences" in told


def test_codes_need_the_disk_of_the_cache(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = {"source": "text", "sequences": 1, "length": 64}
    plan = make_plan(*opened(checkpoint, tmp_path, calibration=calibration, method="gptq"), EXPORTERS, verified=False)
    cache, usage = tmp_path / "cache", shutil.disk_usage(tmp_path)
    cache.mkdir()

    def told(at_out: int, at_cache: int) -> str:
        free = {tmp_path: at_out, cache: at_cache}
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[path]))
        return str(shortage_of(plan, tmp_path / "out", cache))

    assert plan.kept > 0 and f"expected {plan.disk:,}" in told(plan.disk - 1, 0) and told(plan.disk, 0) == "None"
    stat = Path.stat

    def elsewhere(path: Path, **names: bool) -> os.stat_result:
        state = stat(path, **names)
        return os.stat_result((*state[:2], state.st_dev + 1, *state[3:10])) if path == cache else state

    monkeypatch.setattr(Path, "stat", elsewhere)
    apart = plan.kept + plan.scratch
    assert told(plan.written, apart) == "None"
    assert str(cache) in (short := told(plan.disk, apart - 1)) and "TUNDISH_CACHE" in short
    assert "--out" in told(plan.written - 1, apart)
    plan = replace(plan, scratch=2 * plan.written)
    assert "fewer targets" in told(plan.written - 1, plan.disk), "no calibration is on that disk"


def test_what_is_there_already_is_room_for_the_pour_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calibration's files come beside what a killed build has left."""
    plan = replace(make_plan(*opened(checkpoint, tmp_path), EXPORTERS, verified=False), kept=1000, scratch=2000)
    usage = shutil.disk_usage(tmp_path)
    for already, needed in ((0, plan.written + 1000), (4000, plan.written - 3000), (plan.written, 3000)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=needed: usage._replace(free=free))
        assert shortage_of(plan, tmp_path / "out", already=already) is None
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=needed - 1: usage._replace(free=free))
        assert f"expected {needed:,} bytes" in str(shortage_of(plan, tmp_path / "out", already=already))


def test_each_thread_needs_its_blocks(checkpoint: Path, tmp_path: Path) -> None:
    model, recipe = opened(checkpoint, tmp_path)
    one, four = (make_plan(model, recipe, EXPORTERS, threads, verified=False).memory for threads in (1, 4))
    assert one > own_memory() and four - one > 3 * (4 << 20)


def test_what_does_not_fit_is_refused_with_both_figures(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(*opened(checkpoint, tmp_path), EXPORTERS, verified=False)
    assert shortage_of(plan, tmp_path / "not" / "yet") is None
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.disk - 1))
        assert f"{plan.disk:,} bytes free; found {plan.disk - 1:,}" in str(shortage_of(plan, tmp_path / "out"))
    memory = psutil.virtual_memory()
    missing = plan.memory - own_memory()  # the plan counts what this process holds already
    assert 0 < missing < plan.memory
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=missing + (8 << 20)))
        assert shortage_of(plan, tmp_path / "out") is None
        patch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=missing - (8 << 20)))
        told = str(shortage_of(plan, tmp_path / "out"))
        assert f"expected {plan.memory:,} bytes; found " in told and "--no-verify" in told
    verified = replace(plan, phases={**plan.phases, "reference": 1 << 60})
    assert "not enough memory" in str(shortage_of(verified, tmp_path / "out"))


def test_a_plan_that_does_not_fit_is_made_but_not_timed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, schemes=INT4)
    choices = Choices(str(recipe), out=tmp_path / "out", verify=False)
    _, plan = plan_job(choices)
    assert plan.shortage is None and plan.time is not None
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1))
    _, plan = plan_job(choices)
    assert plan.time is None and "found 1" in str(plan.shortage)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read the text.*t\.txt"),
        (b"", r"too short \(.*t\.txt\); expected 4 sequences of 64 tokens; found 0 tokens"),
        (b"too little", "too short"),
        (b"good " * 9 + b"\xff", "not UTF-8.*byte 45"),
        (b"a" * 50_000, "says nothing"),
    ],
)
def test_a_text_that_the_build_would_refuse(
    checkpoint: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    """Though nothing is kept that it could be compared with."""
    text = tmp_path / "t.txt"
    if content is not None:
        text.write_bytes(content)
    calibration = {"source": "text", "text": str(text), "sequences": 4, "length": 64}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, schemes=INT4, calibration=calibration)
    for fresh in (False, True):
        with pytest.raises(UsageError, match=message):
            plan_job(Choices(str(recipe), verify=False, fresh=fresh))


def test_an_importance_matrix_that_the_build_would_refuse(checkpoint: Path, tmp_path: Path) -> None:
    calibration = {"source": "imatrix", "file": str(tmp_path / "i.gguf")}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, schemes=INT4, calibration=calibration)
    with pytest.raises(UsageError, match=r"cannot read the importance matrix.*i\.gguf"):
        plan_job(Choices(str(recipe), verify=False))
    text = {"source": "text", "text": str(LICENSE), "sequences": 1, "length": 32}
    other = write_recipe(tmp_path / "t.yaml", checkpoint, targets={"gguf": {}}, schemes=INT4, calibration=text)
    build(Choices(str(other), out=tmp_path / "out", verify=False), QUIET)
    with pytest.raises(UsageError, match=r"cannot read the importance matrix.*i\.gguf"):
        plan_job(Choices(str(recipe), verify=False))


def test_a_dataset_is_looked_for_and_not_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converters.hub_dataset.fetch", lambda *what: pytest.fail("it may take minutes"))
    asked: list[object] = []
    monkeypatch.setattr("converters.hub_dataset.find_dataset", lambda *what: asked.append(what))
    calibration = {"source": "dataset", "dataset": "acme/prose", "sequences": 4, "length": 64}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, schemes=INT4, calibration=calibration)
    plan_job(Choices(str(recipe), verify=False))
    assert asked == [("acme/prose", None, None)]


def test_little_of_a_long_calibration_is_looked_at(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tundish.calibrate.CHECKED", 256)
    asked: list[tuple[int, int]] = []

    def noted(model: Model, origin: Origin, sequences: int, length: int, *others: Any) -> NDArray[np.int64]:
        asked.append((sequences, length))
        return calibration_sequences(model, origin, sequences, length, *others)

    monkeypatch.setattr("tundish.calibrate.calibration_sequences", noted)
    calibration = {"source": "text", "text": str(LICENSE), "sequences": 1 << 16, "length": 64}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, schemes=INT4, calibration=calibration)
    plan_job(Choices(str(recipe), verify=False))
    assert asked == [(4, 64)]
