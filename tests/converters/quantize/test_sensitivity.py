"""What each matrix costs: measured as a naive run of the whole model does, foreseen from gradients that are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from converters.config import ModelConfig
from converters.errors import ModelError
from converters.graph import Graph, Node, Weight
from converters.interpret import WeightRows, interpret
from converters.ops import Embedding, Rows
from converters.quantize.fisher import estimate_costs, see_gradients, use_count
from converters.quantize.importance import random_token_importance
from converters.quantize.scheme import SCHEMES
from converters.quantize.sensitivity import (
    QuantizedRows,
    mean_kl,
    measure_sensitivity,
    scheme_error,
    segment_count,
    stacks,
)
from converters.quantize.tensor import F32
from tests.converters.arrays import ArraySource
from tests.exporters.tiny_graphs import BASE, VOCAB, longrope, random_graph

MODELS = {
    "fused": replace(BASE, num_kv_heads=2),
    "tied_window": replace(BASE, family="llama", tie_embeddings=True, sliding_window=7),
    "longrope": replace(BASE, rope=longrope(8, 12), num_kv_heads=1),
}
IDS = np.random.default_rng(1).integers(0, VOCAB, (2, 12))

each_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())


def quantized(graph: Graph, scheme: str) -> Graph:
    return graph.map_weights(lambda w: replace(w, scheme=SCHEMES[scheme]) if len(w.shape) == 2 else w)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def naive_kl(graph: Graph, token_ids: np.ndarray, read: Callable[[Weight], Rows]) -> float:
    p, q = (log_softmax(interpret(graph, token_ids, read=each)) for each in (WeightRows, read))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@each_model
def test_measured_is_what_a_whole_run_with_one_stack_changed_gives(config: ModelConfig) -> None:
    graph = quantized(random_graph(config), "int4_g32")
    importance = random_token_importance(graph, 16, 0)
    steps: list[int] = []
    measured = measure_sensitivity(graph, IDS, importance, steps.append)
    assert set(measured) == set(stacks(graph)) and sum(steps) == segment_count(graph)
    for names, kl in measured.items():

        def read(weight: Weight, names: tuple[str, ...] = names) -> Rows:
            changed = weight.name in names
            return QuantizedRows(weight, importance.get(weight.name)) if changed else WeightRows(weight)

        assert kl == pytest.approx(naive_kl(graph, IDS, read), rel=1e-3), names


def test_many_streams_walk_together_as_they_do_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = quantized(random_graph(MODELS["fused"]), "int4_g32")
    together = measure_sensitivity(graph, IDS, {})
    monkeypatch.setattr("converters.quantize.sensitivity._TOGETHER", 1)
    alone = measure_sensitivity(graph, IDS, {})
    assert list(alone.values()) == pytest.approx(list(together.values()), rel=1e-3)


def test_scheme_error_is_the_weighted_square() -> None:
    weight = random_graph(MODELS["fused"]).weights["blocks.0.mlp_up"]
    importance = np.random.default_rng(0).uniform(0.1, 2, weight.shape[-1]).astype(np.float32)
    stored = QuantizedRows(replace(weight, scheme=SCHEMES["int4_g32"]), importance)[:]
    squares = (stored - WeightRows(weight)[:]).astype(np.float64) ** 2
    expected = (squares * importance).sum(axis=1).mean()
    assert scheme_error(weight, SCHEMES["int4_g32"], importance) == pytest.approx(expected)
    assert scheme_error(weight, SCHEMES["int8_g32"], importance) < expected / 100


@each_model
def test_gradients_are_the_slopes_of_the_loss(config: ModelConfig) -> None:
    graph, seed = random_graph(config), 5
    gradients = {name: np.zeros(w.shape) for name, w in graph.weights.items() if len(w.shape) == 2}

    def see(node: Node, weight: Weight, x: np.ndarray, g: F32) -> None:
        if isinstance(node.op, Embedding):
            np.add.at(gradients[weight.name], x.reshape(-1), g.reshape(-1, g.shape[-1]))
        else:
            gradients[weight.name] += np.einsum("sto,sti->oi", g, x)

    see_gradients(graph, IDS, seed, see)
    p = np.exp(log_softmax(interpret(graph, IDS))).reshape(-1, VOCAB)
    limits = np.random.default_rng(seed).random(len(p))
    drawn = [int(np.searchsorted(np.cumsum(row), limit)) for row, limit in zip(p, limits, strict=True)]

    def loss(name: str, change: F32) -> float:
        def read(weight: Weight) -> Rows:
            return WeightRows(weight)[:] + change if weight.name == name else WeightRows(weight)

        logs = log_softmax(interpret(graph, IDS, read=read)).reshape(-1, VOCAB)
        return -float(logs[np.arange(len(drawn)), drawn].sum())

    for name, gradient in gradients.items():
        direction = np.random.default_rng(2).normal(size=gradient.shape).astype(np.float32)
        step = np.float32(3e-4)
        slope = (loss(name, step * direction) - loss(name, -step * direction)) / (2 * step)
        assert slope == pytest.approx((gradient * direction).sum(), abs=2e-3 * float(np.linalg.norm(gradient))), name


def test_the_estimate_foresees_what_is_measured() -> None:
    graph = quantized(random_graph(MODELS["fused"]), "int8_g32")
    ids = np.random.default_rng(3).integers(0, VOCAB, (64, 6))
    steps: list[int] = []
    schemes = {name: [SCHEMES["int8_g32"]] for names in stacks(graph) for name in names}
    costs = estimate_costs(graph, ids, schemes, {}, advance=steps.append)
    assert sum(steps) == use_count(graph)
    for names, kl in measure_sensitivity(graph, ids, {}).items():
        assert sum(costs[name][0] for name in names) == pytest.approx(kl, rel=0.5), names


@pytest.mark.parametrize(
    "difference",
    [[0, 0, 0], [1e-4, -2e-4, 0], [1, -2, 0.5], [0, 100, 0], [0, 0, 300], [-50, 0, 0], [-20, -20, -20], [0, 3e38, -1]],
    ids=str,
)
def test_kl_of_any_finite_logits(difference: list[float]) -> None:
    logits = np.array([[0, -20, -200], [3, 2, 1]], np.float32)
    changed = logits.astype(np.float64) + np.array(difference, np.float32)
    log_p, log_q = log_softmax(logits), log_softmax(changed)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()
    given = np.broadcast_to(np.array(difference, np.float32), logits.shape)
    found = mean_kl(np.exp(log_p).astype(np.float32), logits, given)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_a_stack_that_makes_nonsense_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = quantized(random_graph(MODELS["fused"]), "int4_g32")
    nothing = np.full((VOCAB, 64), np.nan, np.float32)

    def read(rows: QuantizedRows, where: slice) -> F32:
        return nothing[where] if rows.weight.name == "lm_head" else WeightRows(rows.weight)[where]

    monkeypatch.setattr(QuantizedRows, "__getitem__", read)
    with pytest.raises(ModelError, match=r"no finite values.*logits with lm_head quantized"):
        measure_sensitivity(graph, IDS, {})


def test_nonsense_is_refused() -> None:
    graph = random_graph(MODELS["fused"])
    broken = replace(graph.weights["lm_head"], source=ArraySource(np.full((VOCAB, 64), np.inf, np.float32)))
    graph = replace(graph, weights={**graph.weights, "lm_head": broken})
    with pytest.raises(ModelError, match="no finite values"), np.errstate(all="ignore"):
        see_gradients(graph, IDS, 0, lambda *seen: None)
    with pytest.raises(ModelError, match="no finite values"), np.errstate(all="ignore"):
        measure_sensitivity(graph, IDS, {})
