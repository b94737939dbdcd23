"""Folding scales changes the weights and not the model: for every family, by the interpreter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters.graph import Graph
from converters.interpret import WeightRows, interpret
from converters.load import load_graph
from converters.passes.fold import ScaledSource, fold_scales, producer_of
from converters.quantize.block import quantize_rows
from converters.quantize.rtn import quantize_rtn
from converters.quantize.scheme import SCHEMES
from converters.quantize.tensor import F32, QuantTensor
from tests.converters.arrays import ArraySource
from tests.converters.tiny_models import VARIANTS, make_checkpoint


def random_scales(graph: Graph, seed: int = 0) -> dict[str, F32]:
    """Scales over a factor of 16 for every Linear that can have them."""
    rng = np.random.default_rng(seed)
    scales: dict[str, F32] = {}
    for node in graph.nodes:
        producer = producer_of(graph, node)
        if producer:
            by_row = (2.0 ** rng.uniform(-2, 2, producer.rows.max() + 1)).astype(np.float32)
            scales[node.name] = by_row[producer.rows]
    return scales


@pytest.mark.parametrize("name", VARIANTS)
def test_the_folded_model_computes_the_same(name: str, tmp_path: Path) -> None:
    graph = load_graph(make_checkpoint(name, tmp_path))
    scales = random_scales(graph)
    linears = ("qkv", "attn_out", "gate_up", "mlp_out")
    expected = {f"blocks.{layer}.{linear}" for layer in range(graph.config.num_layers) for linear in linears}
    assert scales.keys() == expected | (set() if graph.config.tie_embeddings else {"logits"})
    folded = fold_scales(graph, scales)
    changed = {name for name, weight in folded.weights.items() if isinstance(weight.source, ScaledSource)}
    # Gates, queries and keys have columns of their own; a tied embedding and the norm before it stay.
    assert graph.weights.keys() - changed == (
        {"embedding", "final_norm"} if graph.config.tie_embeddings else {"embedding"}
    )
    ids = np.random.default_rng(1).integers(0, graph.config.vocab_size, (2, 24))
    before, after = interpret(graph, ids), interpret(folded, ids)
    assert np.abs(before).max() > 1, "logits too small to prove anything"
    assert np.abs(after - before).max() <= 1e-4


@pytest.mark.parametrize("linear", ["qkv", "attn_out", "gate_up", "mlp_out"])
def test_the_proof_would_notice(linear: str, tmp_path: Path) -> None:
    """Without the division in the producer, or with another row's, the logits are others."""
    graph = load_graph(make_checkpoint("phi3_medium_gqa", tmp_path))
    ids = np.random.default_rng(1).integers(0, graph.config.vocab_size, (1, 12))
    name = f"blocks.1.{linear}"
    folded = fold_scales(graph, {name: random_scales(graph)[name]})
    multiplied = next(node for node in graph.nodes if node.name == name).op.weights
    half = graph.map_weights(lambda weight: folded.weights[weight.name] if weight.name in multiplied else weight)
    assert np.abs(interpret(half, ids) - interpret(graph, ids)).max() > 0.01


def test_scales_of_grouped_heads_must_agree(tmp_path: Path) -> None:
    graph = load_graph(make_checkpoint("phi3_medium_gqa", tmp_path))  # 4 heads, 2 of k and v
    scale = np.ones(64, np.float32)
    scale[0] = 2  # of the first head; the second shares its row
    with pytest.raises(AssertionError, match=r"blocks\.0\.attn_out"):
        fold_scales(graph, {"blocks.0.attn_out": scale})
    scale[16] = 2
    fold_scales(graph, {"blocks.0.attn_out": scale})


def test_what_is_read_twice_is_not_scaled(tmp_path: Path) -> None:
    graph = load_graph(make_checkpoint("phi3_mini_4k", tmp_path))
    nodes = {node.name: node for node in graph.nodes}
    assert producer_of(graph, nodes["blocks.0.qkv"])
    again = replace(nodes["blocks.0.attn_residual"], inputs=("blocks.0.attn_normed", "blocks.0.attn_out"))
    twice = replace(graph, nodes=tuple(again if node.name == again.name else node for node in graph.nodes))
    assert producer_of(twice, nodes["blocks.0.qkv"]) is None
    norm = replace(nodes["blocks.0.mlp_normed"], op=nodes["blocks.0.attn_normed"].op)
    shared = replace(graph, nodes=tuple(norm if node.name == norm.name else node for node in graph.nodes))
    assert producer_of(shared, nodes["blocks.0.qkv"]) is None


def test_what_exporters_store_is_scaled_and_the_input_graph_is_not(tmp_path: Path) -> None:
    graph = load_graph(make_checkpoint("phi3_medium_gqa", tmp_path))
    stored_scheme = SCHEMES["int4_g32"]
    graph = graph.map_weights(lambda weight: replace(weight, scheme=stored_scheme))
    before = dict(graph.weights)
    scales = random_scales(graph)
    folded = fold_scales(graph, scales)
    assert dict(graph.weights) == before
    name = "blocks.0.mlp_up"
    values = WeightRows(graph.weights[name])[0:96]
    rows: F32 = np.float32(1) / scales["blocks.0.mlp_out"]
    expected = values * rows[:, None] * scales["blocks.0.gate_up"]
    stored = quantize_rows(folded.weights[name], 10, 30)
    assert isinstance(stored, QuantTensor)
    np.testing.assert_array_equal(stored.dequantize(), quantize_rtn(expected[10:30], stored_scheme).dequantize())


def test_scaled_source() -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    rows, columns = np.array([1, 2, 4, 8], np.float32), np.array([1, 0.5, 3], np.float32)
    source = ScaledSource(ArraySource(table), rows, columns)
    assert source.shape == (4, 3) and source.dtype == np.float32 and source.location == ("", 0)
    np.testing.assert_array_equal(source.read(1, 3), (table * rows[:, None] * columns)[1:3])
    np.testing.assert_array_equal(ScaledSource(ArraySource(table), rows).read(2, 4), (table * rows[:, None])[2:4])
    np.testing.assert_array_equal(ScaledSource(ArraySource(rows), rows).read(0, 4), rows * rows)
    np.testing.assert_array_equal(table, np.arange(12).reshape(4, 3))
