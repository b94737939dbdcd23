"""A model with folded scales in every container: they store the scaled weights, and compute what the original does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters.interpret import WeightRows, interpret
from converters.passes.assign import assign_schemes
from converters.passes.fold import fold_scales, producer_of
from converters.quantize.scheme import SCHEMES
from converters.quantize.tensor import F32
from exporters.base import Model, Target
from exporters.registry import EXPORTERS
from tests.exporters.oracle import canonical, random_ids
from tests.exporters.tiny_checkpoints import make_model
from tests.exporters.tiny_graphs import BASE, model_of, random_graph
from tundish.pour import pour


def original(target: Target, folder: Path) -> Model:
    """With the tokenizer that a container needs: its own files, or one of the model's size."""
    if target in (Target.OPENVINO, Target.MLX):
        return make_model("phi3_medium_gqa", folder)
    return model_of(random_graph(replace(BASE, num_kv_heads=2)))


def fold(model: Model, scheme: str) -> Model:
    rng = np.random.default_rng(0)
    scales: dict[str, F32] = {}
    for node in model.graph.nodes:
        if producer := producer_of(model.graph, node):
            by_row = (2.0 ** rng.uniform(-1, 1, producer.rows.max() + 1)).astype(np.float32)
            scales[node.name] = by_row[producer.rows]
    assert len(scales) == 4 * model.graph.config.num_layers + 1
    return replace(model, graph=assign_schemes(fold_scales(model.graph, scales), SCHEMES[scheme], {}))


def write(model: Model, target: Target, folder: Path) -> Path:
    exporter = EXPORTERS[target]
    exporter.check(model, exporter.options())
    pour(model.graph, {target: exporter.layout(model, exporter.options())}, folder)
    return folder / target


@pytest.mark.parametrize("target", Target)
def test_containers_hold_the_scaled_weights(target: Target, tmp_path: Path) -> None:
    before = original(target, tmp_path)
    model = fold(before, "int4_g32")
    stored = dict(EXPORTERS[target].read_back(write(model, target, tmp_path), model))
    assert stored.keys() == {name for name, weight in model.graph.weights.items() if len(weight.shape) == 2}
    for name, values in stored.items():
        np.testing.assert_array_equal(values, canonical(model.graph.weights[name]), err_msg=name)
        off = np.abs(values - WeightRows(before.graph.weights[name])[:]).max()
        assert off > 0.3 or name == "embedding", name


@pytest.mark.parametrize("target", Target)
def test_runtimes_compute_what_the_original_does(target: Target, tmp_path: Path) -> None:
    before = original(target, tmp_path)
    exporter = EXPORTERS[target]
    folder = write(fold(before, "fp32"), target, tmp_path)
    ids = random_ids(before.graph, 20)
    found = exporter.open(folder, exporter.options()).logits(ids)
    expected = interpret(before.graph, np.array([ids], np.int64))[0]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=2e-4)
