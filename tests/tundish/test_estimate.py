"""The estimated time: every kind of work is measured once, by the pour's own code, and nothing is left behind."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from converters.checkpoint import TensorSource
from converters.errors import ModelError, ResourceError
from converters.graph import Graph
from converters.quantize.sequential import fittable
from converters.quantize.tensor import FloatArray
from converters.source import Source, source_files
from exporters.base import Layout, Model, Target
from exporters.registry import EXPORTERS
from tests.converters.arrays import ArraySource
from tests.tundish.tiny import INT4, write_recipe
from tundish import estimate, pour
from tundish.big_file import BigFileWriter
from tundish.calibrate import Reading
from tundish.estimate import Time, estimate_time, kinds_of_work, warm_up
from tundish.model import open_model
from tundish.plan import make_plan
from tundish.recipe import load_recipe


@pytest.fixture(scope="module")
def opened(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, dict[Target, Layout]]:
    recipe = load_recipe(write_recipe(tmp_path_factory.mktemp("recipe") / "r.yaml", checkpoint, schemes=INT4))
    model = open_model(Source("tiny", checkpoint), recipe)
    return model, dict(make_plan(model, recipe, EXPORTERS).layouts)


def test_kinds_share_scheme_and_packing_and_count_every_matrix(opened: tuple[Model, dict[Target, Layout]]) -> None:
    model, layouts = opened
    kinds = kinds_of_work(model.graph, layouts)
    assert {kind.weight.scheme.name for kind in kinds} == {"int4_g32", "int8_g32"}
    matrices = [weight for weight in model.graph.weights.values() if len(weight.shape) > 1]
    assert sum(kind.elements for kind in kinds) == sum(math.prod(weight.shape) for weight in matrices)
    assert [kind.elements for kind in kinds] == sorted((kind.elements for kind in kinds), reverse=True)
    assert len(kinds) < len(matrices)
    alone = kinds_of_work(model.graph, {Target.GGUF: layouts[Target.GGUF]})
    assert len(alone) == 2, "in GGUF all matrices of a scheme are packed alike"


@pytest.mark.parametrize("threads", [1, 3])
def test_every_part_is_measured_and_the_folder_left_as_it_was(
    opened: tuple[Model, dict[Target, Layout]], checkpoint: Path, tmp_path: Path, threads: int
) -> None:
    model, layouts = opened
    (tmp_path / "mine").write_text("x")
    files = source_files(checkpoint).values()
    read = Reading(1, 8)
    spent = estimate_time(model.graph, layouts, files, tmp_path, threads, read, prepare=1, calibrated=True)
    assert all(part > 0 for part in spent.parts().values())
    assert estimate_time(model.graph, layouts, files, tmp_path, threads).calibrate == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_reading_and_quantizing_take_turns_while_others_write() -> None:
    spent = Time(threads=2, prepare=6, calibrate=1, read=2, quantize=3, write=4, source=0, digest=1)
    assert spent.total == 6 + 1 + 5.5
    assert replace(spent, write=40).total == 6 + 1 + 40
    parts = {
        "prepare": 6,
        "calibrate": 1,
        "read": 2,
        "quantize": 3,
        "write": 4,
        "source": 0,
        "digest": 1,
        "total": 12.5,
    }
    assert spent.parts() == parts


@pytest.mark.parametrize(("source", "more"), [(5, 0), (6, 0), (8, 1), (16, 5), (26, 15)])
def test_the_checkpoint_is_hashed_beside_the_rest(source: float, more: float) -> None:
    """By the time the pour begins 6 s of it are done; then it shares two threads, or holds up the end."""
    spent = Time(threads=2, prepare=6, calibrate=1, read=2, quantize=3, write=4, source=source, digest=0)
    assert spent.total == 12 + more


def test_the_work_measured_is_the_pours(
    opened: tuple[Model, dict[Target, Layout]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are as long as the pour's own, once for each kind and thread."""
    model, layouts = opened
    rows: dict[str, set[int]] = {}

    def counted(block: pour.Block, *others: object) -> bytes:
        weight, start, stop = block
        rows.setdefault(weight.name, set()).add(stop - start)
        return b""

    monkeypatch.setattr(estimate, "pour_block", counted)
    monkeypatch.setattr(estimate, "_COMPUTE_SECONDS", 0.0)
    estimate_time(model.graph, layouts, [next(iter(tmp_path.parent.iterdir()))], tmp_path, 2)
    kinds = kinds_of_work(model.graph, layouts)
    assert rows == {kind.weight.name: {kind.weight.shape[0]} for kind in kinds}, "tiny matrices are one block each"


@dataclass(frozen=True, slots=True, eq=False)
class _Cold:
    """A source that moves a clock: by 100 s where it is read for the first time, and by 1 s from then on."""

    base: TensorSource
    clock: list[float]
    seen: list[bool]

    shape = property(lambda self: self.base.shape)
    dtype = property(lambda self: self.base.dtype)
    location = property(lambda self: self.base.location)

    def read(self, start: int, stop: int) -> FloatArray:
        self.clock[0] += 1.0 if self.seen else 100.0
        self.seen.append(True)
        return self.base.read(start, stop)


def test_quantizing_is_not_measured_against_a_cold_disk(
    opened: tuple[Model, dict[Target, Layout]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layouts = opened
    clock = [0.0]
    graph = model.graph.map_weights(lambda each: replace(each, source=_Cold(each.source, clock, [])))

    def one_second(block: pour.Block, *others: object) -> bytes:
        weight, start, stop = block
        weight.source.read(start, stop)
        clock[0] += 1.0
        return b""

    monkeypatch.setattr(estimate, "pour_block", one_second)
    monkeypatch.setattr(estimate, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(estimate, "_read_seconds", lambda *arguments: 0.0)
    spent = estimate_time(graph, layouts, [], tmp_path, 1)
    blocks = [kind.elements / math.prod(kind.weight.shape) for kind in kinds_of_work(graph, layouts)]
    assert spent.quantize == pytest.approx(sum(blocks))


def test_what_is_measured_is_multiplied(
    opened: tuple[Model, dict[Target, Layout]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine where everything takes one second: hashing 8 MiB, writing 64 MiB, hashing these, a block."""
    model, layouts = opened
    source = tmp_path / "weights"
    source.write_bytes(bytes(100))
    ticks = itertools.count()
    monkeypatch.setattr(estimate, "perf_counter", lambda: float(next(ticks)))
    spent = estimate_time(model.graph, layouts, [source], tmp_path, 1)
    written = sum(file.nbytes for layout in layouts.values() for file in layout.big.values())
    assert spent.quantize == 0, "reading a block takes as long as reading and quantizing it"
    assert spent.write == pytest.approx(written / (64 << 20))
    assert spent.digest == pytest.approx(written / (8 << 20))
    assert spent.source == pytest.approx(100 / (8 << 20))
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=99))
    without_room = estimate_time(model.graph, layouts, [source], tmp_path, 1)
    assert without_room.source == pytest.approx(spent.source + without_room.read), "the checkpoint is read again"


def test_a_model_that_is_fitted_reads_each_sequence_twice_and_multiplies(
    opened: tuple[Model, dict[Target, Layout]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine where a block takes one second, and a product of second moments another."""
    model, layouts = opened
    ticks = itertools.count()
    monkeypatch.setattr(estimate, "perf_counter", lambda: float(next(ticks)))

    def calibrate(read: Reading) -> float:
        return estimate_time(model.graph, layouts, [], tmp_path, 1, read, calibrated=True).calibrate

    layers = model.graph.config.num_layers
    assert calibrate(Reading(1, 16)) == layers and calibrate(Reading(3, 16, together=True)) == 3 * layers
    # Second moments of both models' inputs: 64 wide for qkv, output and mlp, 96 wide for down, once more for the head.
    moments = 2 * 48 * (layers * (3 * 64**2 + 96**2) + 64**2)
    matrices = sum(math.prod(weight.shape) * weight.shape[1] for weight in fittable(model.graph))
    fitting = (moments + 6 * matrices) / (1024 * 64**2)
    assert calibrate(Reading(3, 16, together=True, fitted=True)) == pytest.approx(6 * layers + fitting)
    few = sum(math.prod(weight.shape) * weight.shape[1] for weight in fittable(model.graph) if weight.scheme.bits < 8)
    refining = 2 * 10 * few / (1024 * 64**2)
    read = Reading(3, 16, together=True, fitted=True, steps=10)
    assert few and calibrate(read) == pytest.approx(6 * layers + fitting + refining)


def test_a_nearly_full_disk_is_not_filled(
    opened: tuple[Model, dict[Target, Layout]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layouts = opened
    source = tmp_path / "weights"
    source.write_bytes(bytes(100))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=6 << 20))
    sizes: list[int] = []

    def noted(path: Path, nbytes: int) -> BigFileWriter:
        sizes.append(nbytes)
        return BigFileWriter(path, nbytes)

    monkeypatch.setattr(estimate, "BigFileWriter", noted)
    estimate_time(model.graph, layouts, [source], tmp_path, 2)
    assert sizes == [1 << 20] * 2, "half of what is free, in whole pieces"


def test_a_folder_that_takes_nothing_is_told(opened: tuple[Model, dict[Target, Layout]], tmp_path: Path) -> None:
    model, layouts = opened
    with pytest.raises(ResourceError, match="cannot write"):
        estimate_time(model.graph, layouts, [], tmp_path / "absent", 1)


def test_warming_up_names_a_damaged_weight(opened: tuple[Model, dict[Target, Layout]]) -> None:
    model, layouts = opened

    def damaged(graph: Graph) -> Graph:
        name = kinds_of_work(graph, layouts)[0].weight.name
        values = graph.weights[name].source.read(0, graph.weights[name].shape[0]).astype("float32")
        values[0, 0] = float("nan")
        return graph.map_weights(lambda each: replace(each, source=ArraySource(values)) if each.name == name else each)

    warm_up(model.graph, layouts, calibrated=True)
    with pytest.raises(ModelError, match="NaN or Inf"):
        warm_up(damaged(model.graph), layouts, calibrated=False)
