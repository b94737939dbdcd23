"""Activation-aware scales against a naive search on the inputs themselves, and through a folded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters.errors import ModelError
from converters.graph import Node
from converters.interpret import interpret
from converters.load import load_graph
from converters.passes.assign import assign_schemes
from converters.passes.fold import fold_scales, producer_of
from converters.quantize.awq import awq_scales, find_scales, output_error
from converters.quantize.rtn import quantize_rtn
from converters.quantize.scheme import SCHEMES
from converters.quantize.tensor import F32
from tests.converters.arrays import ArraySource
from tests.converters.tiny_models import make_checkpoint

SCHEME = SCHEMES["int4_g128"]


def inputs_of_a_model(tokens: int, width: int) -> F32:
    """f32[tokens, in]: a few columns much larger than the others."""
    rng = np.random.default_rng(0)
    x: F32 = (rng.standard_normal((tokens, width)) * np.exp(1.5 * rng.standard_normal(width))).astype(np.float32)
    return x


def weights(width: int) -> list[F32]:
    rng = np.random.default_rng(1)
    return [(rng.standard_normal((rows, width)) * 0.02).astype(np.float32) for rows in (48, 16)]


def naive_scales(x: F32, parts: Sequence[F32]) -> tuple[F32, float]:
    """The paper's search by the outputs of all inputs, and the error it ends with."""
    square = np.square(x.astype(np.float64)).mean(axis=0)
    importance = square / square.mean() + 0.01
    w = np.concatenate(parts)
    best, least = np.ones(w.shape[1]), np.inf
    for step in range(20):
        s = importance ** (0.5 * step / 20)
        s /= np.sqrt(s.max() * s.min())
        s32 = s.astype(np.float32)
        q = quantize_rtn(w * s32, SCHEME, (importance / s**2).astype(np.float32)).dequantize() / s32
        error = float(np.square(x.astype(np.float64) @ (q - w).T).sum())
        if error < least:
            best, least = s, error
    return best.astype(np.float32), least


def test_equals_the_naive_search() -> None:
    x, parts = inputs_of_a_model(300, 256), weights(256)
    expected, _ = naive_scales(x, parts)
    found = awq_scales(parts, x.T @ x, SCHEME)
    assert found.dtype == np.float32 and np.ptp(expected) > 0
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    mean: F32 = x.T @ x / np.float32(300)
    np.testing.assert_allclose(awq_scales(parts, mean, SCHEME), expected, rtol=1e-5)


def test_output_error_is_that_of_the_outputs() -> None:
    x, w = inputs_of_a_model(50, 64), weights(64)[0]
    off = (w + np.random.default_rng(2).standard_normal(w.shape) * 0.001).astype(np.float32)
    expected = np.square(x.astype(np.float64) @ (off - w).T.astype(np.float64)).sum()
    assert output_error(w, off, x.T @ x) == pytest.approx(expected, rel=1e-4)


def test_the_outputs_get_better() -> None:
    x, (w, _) = inputs_of_a_model(300, 256), weights(256)
    hessian = x.T @ x
    importance = np.diagonal(hessian) / np.diagonal(hessian).mean()
    scale = awq_scales([w], hessian, SCHEME)
    plain = output_error(w, quantize_rtn(w, SCHEME, importance).dequantize(), hessian)
    scaled = quantize_rtn(w * scale, SCHEME, importance / scale**2).dequantize() / scale
    assert output_error(w, scaled, hessian) < 0.95 * plain


def test_equal_and_silent_inputs_are_left_alone() -> None:
    for hessian in (np.eye(256, dtype=np.float32), np.zeros((256, 256), np.float32)):
        np.testing.assert_array_equal(awq_scales(weights(256), hessian, SCHEME), 1)


def test_a_silent_column_gets_a_positive_scale() -> None:
    x = inputs_of_a_model(300, 256)
    x[:, 7] = 0
    scale = awq_scales(weights(256), x.T @ x, SCHEME)
    assert np.isfinite(scale).all() and (scale > 0).all() and np.ptp(scale) > 0


def test_columns_that_share_a_row_get_one_scale() -> None:
    x = inputs_of_a_model(300, 256)
    rows = np.arange(256) % 64
    scale = awq_scales(weights(256), x.T @ x, SCHEME, rows)
    assert np.ptp(scale) > 0
    np.testing.assert_array_equal(scale, np.tile(scale[:64], 4))


def test_scales_of_a_model_fold(tmp_path: Path) -> None:
    graph = load_graph(make_checkpoint("phi3_medium_gqa", tmp_path))
    ids = np.random.default_rng(0).integers(0, graph.config.vocab_size, (4, 32))
    scales: dict[str, F32] = {}

    def observe(node: Node, inputs: Sequence[np.ndarray]) -> None:
        producer = producer_of(graph, node)
        if producer is None:
            return
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        parts = [graph.weights[name].source.read(0, graph.weights[name].shape[0]) for name in node.op.weights]
        values = [part.astype(np.float32) for part in parts]
        scales[node.name] = awq_scales(values, x.T @ x, SCHEMES["int4_g32"], producer.rows)

    before = interpret(graph, ids, observe=observe)
    assert len(scales) == 4 * graph.config.num_layers + 1  # and the head, which is not tied
    assert sum(np.ptp(scale) > 0 for scale in scales.values()) > 4
    assert np.abs(interpret(fold_scales(graph, scales), ids) - before).max() <= 1e-4


def test_a_scale_that_drives_weights_out_of_range_is_not_chosen() -> None:
    x, (w, _) = inputs_of_a_model(300, 256), weights(256)
    w *= np.float32(4.5e5) / np.abs(w).max()
    hessian = x.T @ x
    scale = awq_scales([w], hessian, SCHEME)
    assert np.isfinite(quantize_rtn(w * scale, SCHEME).scale).all()
    loudest = np.sqrt(np.diagonal(hessian)) ** np.float32(0.5)
    with pytest.raises(OverflowError):  # which the search has tried
        quantize_rtn(w * (loudest / np.sqrt(loudest.max() * loudest.min())), SCHEME)


def test_weights_beyond_fp16_scales_are_named(tmp_path: Path) -> None:
    graph = assign_schemes(load_graph(make_checkpoint("phi3_medium_gqa", tmp_path)), SCHEMES["int4_g32"], {})
    weight = graph.weights["blocks.0.mlp_up"]
    large = replace(weight, source=ArraySource(np.full(weight.shape, 1e6, np.float32)))
    graph = replace(graph, weights={**graph.weights, weight.name: large})
    with pytest.raises(ModelError, match=r"too large for fp16 scales \(blocks\.0\.mlp_up in "):
        find_scales(graph, np.zeros((1, 8), np.int64))
