"""Fitting a model layer by layer: what each layer is shown, against plain runs of the interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from converters import ops
from converters.errors import ModelError
from converters.graph import Graph, Weight
from converters.interpret import WeightRows, interpret
from converters.load import load_graph
from converters.ops import Add, Linear, Rows
from converters.passes.assign import assign_schemes
from converters.quantize.importance import importance_of, random_token_importance
from converters.quantize.rtn import quantize_rtn
from converters.quantize.scheme import SCHEMES
from converters.quantize.sequential import Moments, fittable, quantize_sequentially
from converters.quantize.tensor import F32, QuantTensor
from converters.role import Role
from tests.converters.tiny_models import make_checkpoint


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    return assign_schemes(load_graph(make_checkpoint("phi3_medium_gqa", tmp_path)), SCHEMES["int4_g32"], {})


def ids_for(graph: Graph, sequences: int = 3) -> np.ndarray:
    return np.random.default_rng(3).integers(0, graph.config.vocab_size, (sequences, 24))


def test_every_layer_sees_what_quantized_layers_compute(graph: Graph) -> None:
    """The Hessian of a layer is that of a model whose earlier layers are quantized; the cross product has floats."""
    token_ids = ids_for(graph)
    seen: dict[str, Moments] = {}
    fitted: dict[str, QuantTensor] = {}

    def fit(weight: Weight, moments: Moments) -> QuantTensor:
        seen[weight.name] = moments
        fitted[weight.name] = quantize_rtn(WeightRows(weight)[:], weight.scheme)
        return fitted[weight.name]

    done: list[int] = []
    importance = quantize_sequentially(graph, token_ids, fit, advance=done.append)
    linear = {name for node in graph.nodes if isinstance(node.op, Linear) for name in node.op.weights}
    assert set(fitted) == linear == set(importance)
    assert sum(done) == sum(np.prod(graph.weights[name].shape) for name in linear)

    def read(weight: Weight) -> Rows:
        return fitted[weight.name].dequantize() if weight.name in fitted else WeightRows(weight)

    before = next(
        node.inputs[0] for node in graph.nodes if isinstance(node.op, Add) and "blocks.1.mlp" in node.inputs[1]
    )
    for name, value in (("blocks.0.attn_q", "blocks.0.attn_normed"), ("blocks.1.mlp_down", "blocks.1.activated")):
        x = interpret(graph, token_ids, read, stop_at=value).reshape(-1, graph.weights[name].shape[1])
        floats = interpret(graph, token_ids, stop_at=value).reshape(x.shape)
        np.testing.assert_allclose(seen[name].hessian, x.T @ x / len(x), rtol=1e-3, atol=1e-6)
        cross = seen[name].cross
        assert cross is not None
        np.testing.assert_allclose(cross, floats.T @ x / len(x), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(importance[name], importance_of(np.square(x).mean(axis=0)), rtol=1e-3)
    x, stream, floats = (
        interpret(graph, token_ids, reader, stop_at=value).reshape(token_ids.size, -1)
        for value, reader in (("blocks.1.activated", read), (before, read), (before, WeightRows))
    )
    lacking = (floats - stream).T @ x / len(x)
    deficit = seen["blocks.1.mlp_down"].deficit
    assert deficit is not None
    np.testing.assert_allclose(deficit, lacking, rtol=1e-3, atol=1e-5)
    assert seen["blocks.0.attn_q"].deficit is None


def test_what_is_quantized_computes_what_follows_from_rows_as_from_the_whole(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices that are widened a few rows at a time give the same inputs, and zeros of their own."""
    graph = assign_schemes(graph, SCHEMES["int4_asym_g32"], {})
    seen: list[list[F32]] = [[], []]
    for number, elements in enumerate((ops.MAX_WEIGHTS, 1000)):
        monkeypatch.setattr(ops, "MAX_WEIGHTS", elements)

        def fit(weight: Weight, moments: Moments, number: int = number) -> QuantTensor:
            seen[number].append(moments.hessian)
            return quantize_rtn(WeightRows(weight)[:], weight.scheme)

        quantize_sequentially(graph, ids_for(graph, 2), fit)
    for whole, part in zip(*seen, strict=True):
        np.testing.assert_allclose(whole, part, rtol=1e-3, atol=1e-5)


def test_only_integer_matrices_are_fitted(graph: Graph) -> None:
    overrides = {Role.MLP_DOWN: SCHEMES["q4_k"], Role.ATTN_OUTPUT: SCHEMES["fp16"]}
    mixed = assign_schemes(graph, SCHEMES["int4_g32"], overrides)
    fitted: list[str] = []

    def fit(weight: Weight, moments: Moments) -> QuantTensor:
        fitted.append(weight.name)
        return quantize_rtn(WeightRows(weight)[:], weight.scheme)

    importance = quantize_sequentially(mixed, ids_for(graph, 1), fit)
    assert fitted == [weight.name for weight in fittable(mixed)]
    left = {"blocks.0.mlp_down", "blocks.1.mlp_down", "blocks.0.attn_output", "blocks.1.attn_output"}
    assert importance.keys() - set(fitted) == left
    assert fittable(assign_schemes(graph, SCHEMES["fp16"], {})) == []


def test_without_a_fit_it_is_importance(graph: Graph) -> None:
    token_ids = np.random.default_rng(5).integers(0, graph.config.vocab_size, (1, 16))
    importance = quantize_sequentially(graph, token_ids)
    for name, expected in random_token_importance(graph, 16, seed=5).items():
        np.testing.assert_allclose(importance[name], expected, rtol=1e-4, err_msg=name)


def test_tied_embeddings_are_fitted_as_heads_and_not_changed_to_match(tmp_path: Path) -> None:
    loaded = load_graph(make_checkpoint("llama3_2", tmp_path))
    graph = assign_schemes(loaded, SCHEMES["int4_g32"], {})
    names: list[str] = []

    def fit(weight: Weight, moments: Moments) -> QuantTensor:
        assert (moments.cross is None) == (weight.name == "embedding") and moments.hessian.shape[0] == weight.shape[1]
        names.append(weight.name)
        return quantize_rtn(WeightRows(weight)[:], weight.scheme)

    importance = quantize_sequentially(graph, ids_for(graph, 1), fit)
    assert names[-1] == "embedding" and names == list(importance)


def test_values_that_are_not_finite_are_named(graph: Graph) -> None:
    def fit(weight: Weight, moments: Moments) -> QuantTensor:
        tensor = quantize_rtn(WeightRows(weight)[:], weight.scheme)
        if weight.name == "blocks.0.mlp_down":
            tensor.scale[:] = np.inf
        return tensor

    with np.errstate(all="ignore"), pytest.raises(ModelError, match=r"no finite values.*blocks\.1\.qkv"):
        quantize_sequentially(graph, ids_for(graph, 1), fit)
