"""Values in memory and in files are the same values, and so is what is computed from them, piece by piece."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import numpy as np
import pytest

from converters.errors import ResourceError
from converters.graph import TOKEN_IDS, Graph, Weight
from converters.interpret import WeightRows, interpret
from converters.load import load_graph
from converters.passes.assign import assign_schemes
from converters.quantize import sequential, stream
from converters.quantize.rtn import quantize_rtn
from converters.quantize.scheme import SCHEMES
from converters.quantize.sensitivity import measure_sensitivity
from converters.quantize.sequential import Moments, Progress, float_hessians, quantize_sequentially
from converters.quantize.stream import Store, Stream, join, steps
from converters.quantize.tensor import F32, QuantTensor
from tests.converters.tiny_models import make_checkpoint

RANDOM = np.random.default_rng(1)


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    return assign_schemes(load_graph(make_checkpoint("phi3_medium_gqa", tmp_path / "model")), SCHEMES["int4_g32"], {})


@pytest.mark.parametrize("room", [0, 1 << 20])
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_what_is_written_is_read(tmp_path: Path, room: int, dtype: type[np.generic]) -> None:
    expected = (RANDOM.standard_normal((5, 3, 7)) * 100).astype(dtype)
    store = Store(tmp_path, room)
    value = store.new(expected.shape, expected.dtype)
    for start in (3, 0):
        value.write(start, expected[start : start + 3])
    for each in (value, store.put(expected)):
        assert len(each) == 5 and (each.shape, each.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(each.read(0, 5), expected)
        np.testing.assert_array_equal(each.read(4, 9), expected[4:])
    assert not list(tmp_path.iterdir()), "files have no names"


def test_room_is_taken_and_given_back(tmp_path: Path) -> None:
    store = Store(tmp_path, 100)
    first, second = (store.new((1, 1, count)) for count in (20, 6))
    assert store.room == 20
    second.free()
    first.free()
    assert store.room == 100
    first.free()
    assert store.room == 100


def test_pieces_have_whole_sequences() -> None:
    assert list(steps((5, 4, 2), 17)) == [(0, 2), (2, 4), (4, 5)]
    assert list(steps((2, 4, 2), 1)) == [(0, 1), (1, 2)]


def test_streams_are_joined_and_parted(tmp_path: Path) -> None:
    arrays = [RANDOM.standard_normal((2, 3, 4)).astype(np.float32) for _ in range(3)]
    store = Store(tmp_path, 100)
    streams = [Stream(store, {"x": store.put(array)}) for array in arrays]
    joined = join(streams)
    np.testing.assert_array_equal(joined.values["x"].read(0, 6), np.concatenate(arrays))
    joined.part(streams[::-1])
    for each, array in zip(streams[::-1], arrays, strict=True):
        np.testing.assert_array_equal(each.values["x"].read(0, 2), array)
    assert not joined.values


def seen(graph: Graph, store: Store) -> dict[str, Moments]:
    """All moments of a model that is rounded while it reads."""
    found: dict[str, Moments] = {}

    def fit(weight: Weight, moments: Moments) -> QuantTensor:
        found[weight.name] = moments
        return quantize_rtn(WeightRows(weight)[:], weight.scheme)

    token_ids = np.random.default_rng(3).integers(0, graph.config.vocab_size, (5, 24))
    quantize_sequentially(graph, token_ids, fit, store=store)
    return found


def test_where_values_lie_changes_nothing(graph: Graph, tmp_path: Path) -> None:
    whole, spilled = seen(graph, Store(tmp_path)), seen(graph, Store(tmp_path, 0))
    for name, moments in whole.items():
        for part in ("hessian", "cross", "deficit"):
            np.testing.assert_array_equal(getattr(moments, part), getattr(spilled[name], part))


def test_room_comes_back(graph: Graph, tmp_path: Path) -> None:
    """One store serves AWQ, then GPTQ: what the first leaves behind, the second lacks."""
    token_ids = np.zeros((2, 16), np.int64)
    store = Store(tmp_path)
    room = store.room
    for _ in float_hessians(graph, token_ids, store):
        assert store.room < room
    assert store.room == room
    seen(graph, store)
    assert store.room == room
    quantize_sequentially(graph, token_ids, store=store)
    assert store.room == room

    def reached(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_sequentially(graph, token_ids, store=store, reached=reached)
    assert store.room == room


def test_pieces_come_to_the_same(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of pieces are summed: the same but for rounding."""
    whole = seen(graph, Store(tmp_path))
    monkeypatch.setattr(stream, "COMPUTED", 2 * 24 * 64)
    monkeypatch.setattr(sequential, "MULTIPLIED", 2 * 24 * 64)
    parts = seen(graph, Store(tmp_path, 0))
    for name, moments in whole.items():
        np.testing.assert_allclose(parts[name].hessian, moments.hessian, rtol=1e-3, atol=1e-5)
        deficit = parts[name].deficit
        assert (moments.deficit is None) == (deficit is None)
        if moments.deficit is not None and deficit is not None:
            np.testing.assert_allclose(deficit, moments.deficit, rtol=1e-2, atol=1e-4)


def test_a_stream_computes_what_the_interpreter_does(graph: Graph, tmp_path: Path) -> None:
    token_ids = RANDOM.integers(0, graph.config.vocab_size, (3, 16))
    store = Store(tmp_path, 0)
    running = Stream(store, {TOKEN_IDS: store.put(token_ids)})
    for node in graph.nodes[:-1]:
        running.run(node, [WeightRows(graph.weights[name]) for name in node.op.weights])
    for name in ("blocks.0.activated", graph.nodes[-1].inputs[0]):
        value: F32 = running.values[name].read(0, 3)
        np.testing.assert_allclose(value, interpret(graph, token_ids, stop_at=name), rtol=1e-4, atol=1e-5)


def test_sensitivity_is_the_same_from_files(graph: Graph, tmp_path: Path) -> None:
    token_ids = RANDOM.integers(0, graph.config.vocab_size, (2, 16))
    spilled = measure_sensitivity(graph, token_ids, {}, store=Store(tmp_path, 0))
    assert measure_sensitivity(graph, token_ids, {}) == spilled


@pytest.mark.skipif(sys.platform == "win32", reason="no /dev/full")
def test_a_full_disk_is_told(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    full = Path("/dev/full")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **names: full.open("r+b", buffering=0))
    store = Store(tmp_path, 0)
    with pytest.raises(OSError, match="No space left") as caught:
        quantize_sequentially(graph, np.zeros((1, 4), np.int64), store=store)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(ResourceError, match=r"No space left.*TMPDIR"):
        measure_sensitivity(graph, np.zeros((1, 4), np.int64), {}, store=store)
