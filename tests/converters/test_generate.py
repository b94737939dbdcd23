"""Growing by a token a step gives the logits of transformers, and tokens are drawn as these say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters.errors import ModelError
from converters.generate import Decoder, batch_size, draw, generate
from converters.graph import Graph, Weight
from converters.interpret import interpret
from converters.load import load_graph
from converters.passes.context import for_context
from tests.converters.arrays import ArraySource

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
tiny_models = pytest.importorskip("tests.converters.tiny_models")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return load_graph(tiny_models.make_checkpoint("smollm2", tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("name", tiny_models.VARIANTS)
def test_every_step_has_the_logits_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converters.generate.KEYS", 5)  # fewer than there are, also within a window
    folder = tiny_models.make_checkpoint(name, tmp_path)
    graph = load_graph(folder)
    for length in tiny_models.VARIANTS[name].lengths:
        ids = np.random.default_rng(length).integers(0, graph.config.vocab_size, (3, length))
        expected = tiny_models.reference_logits(folder, torch.from_numpy(ids)).numpy()
        decoder = Decoder(for_context(graph, length), 3, length)
        found = np.stack([decoder.step(column) for column in ids.T], axis=1)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() <= 1e-4, f"length {length}"
        with pytest.raises(AssertionError, match="no room"):
            decoder.step(ids[:, 0])


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    probabilities = np.array([0.5, 0.0, 0.125, 0.375])
    with np.errstate(divide="ignore"):
        logits = np.tile(np.log(probabilities).astype(np.float32) + 30, (1000, 1))
    drawn = draw(logits, np.arange(1000) / 1000)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 1000, probabilities, atol=2e-3)
    assert draw(logits[:1], np.array([1 - 2**-53])) == [3]
    assert draw(logits[:1], np.array([0.0])) == [0]


def test_each_token_is_the_one_that_the_whole_sequence_gives(graph: Graph) -> None:
    """Without a cache: the logits of every prefix at once, and the same chances."""
    ids = generate(graph, 4, 24, seed=7, openings=[(5, 9)])
    assert ids.shape == (4, 24) and ids.dtype == np.int64
    assert (ids[:, :2] == [5, 9]).all()
    chances = np.random.default_rng(7).random((4, 24))
    logits = interpret(graph, ids)
    for position in range(2, 24):
        shares = np.exp(logits[:, position - 1].astype(np.float64))
        ends = np.cumsum(shares / shares.sum(axis=1, keepdims=True), axis=1)
        np.testing.assert_array_equal(ids[:, position], (ends <= chances[:, position, None]).sum(axis=1))


def test_seeds_and_memory(graph: Graph) -> None:
    first = generate(graph, 6, 16, seed=0)
    assert len(set(first[:, 0].tolist())) > 1  # no opening: random tokens
    past = 2 * 2 * 4 * 16 * 16  # of a sequence: two layers of keys and values, one head of 16 features
    assert batch_size(graph, 6, 16) == 6
    assert batch_size(graph, 6, 16, 2 * 4 * past) == 3  # of four for which there is room, evenly
    assert batch_size(graph, 6, 16, 1) == 1
    steps: list[int] = []
    few = generate(graph, 6, 16, seed=0, most_nbytes=2 * 4 * past, advance=steps.append)
    np.testing.assert_array_equal(few, first)
    assert steps == [3] * 32
    assert (generate(graph, 6, 16, seed=1) != first).any()


def test_openings_follow_stops_in_turn(graph: Graph) -> None:
    stops = {2, *range(20, 60)}
    ids = generate(graph, 3, 120, seed=0, openings=[(5, 21), (2, 7)], stops=stops)
    for row in ids.tolist():
        assert row[:2] == [5, 21]
        kinds = []
        position = 2
        while position < len(row) - 2:
            if row[position] not in stops:
                position += 1
                continue
            kinds.append("answer" if row[position : position + 2] == [2, 7] else "text")
            if kinds[-1] == "text":  # this opening has no stop of its own to replace the one drawn
                assert row[position + 1 : position + 3] == [5, 21]
            position += 2 if kinds[-1] == "answer" else 3
        assert len(kinds) > 4
        assert kinds == ["answer", "text"] * (len(kinds) // 2) + ["answer"] * (len(kinds) % 2)


def test_a_random_start_is_no_stop(graph: Graph) -> None:
    assert set(generate(graph, 200, 1, seed=0, stops=range(150))[:, 0].tolist()) == set(range(150, 160))


def test_a_broken_model(graph: Graph) -> None:
    broken = ArraySource(np.full(graph.weights["final_norm"].shape, np.nan, np.float32))

    def spoil(weight: Weight) -> Weight:
        return replace(weight, source=broken) if weight.name == "final_norm" else weight

    with pytest.raises(ModelError, match="no finite logits"):
        generate(graph.map_weights(spoil), 1, 4, seed=0)
