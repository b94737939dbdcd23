"""Importance of input columns: against transformers' own activations, and what it does to the quantizer's error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from converters.errors import ModelError
from converters.load import load_graph
from converters.quantize.importance import importance_at, random_token_importance
from converters.quantize.rtn import quantize_rtn
from converters.quantize.scheme import SCHEMES
from tests.converters.tiny_models import make_checkpoint

MODULES = {"attn_q": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "mlp_down": "mlp.down_proj"}


def test_equals_the_activations_of_transformers(tmp_path: Path) -> None:
    folder = make_checkpoint("phi3_medium_gqa", tmp_path)
    graph = load_graph(folder)
    importance = random_token_importance(graph, 24, seed=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    seen: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.update({name: inputs[0].square().mean((0, 1)).numpy()})
            )
    token_ids = np.random.default_rng(3).integers(0, graph.config.vocab_size, (1, 24))
    with torch.no_grad():
        model(torch.from_numpy(token_ids), use_cache=False)
    expected = {f"blocks.1.{ours}": seen[f"model.layers.1.{theirs}"] for ours, theirs in MODULES.items()}
    expected["lm_head"] = seen["lm_head"]
    for name, squares in expected.items():
        np.testing.assert_allclose(importance[name], squares / squares.mean() + 0.01, rtol=1e-4, err_msg=name)
    assert importance.keys() == {weight.name for weight in graph.weights.values() if len(weight.shape) == 2} - {
        "embedding"
    }


@pytest.mark.parametrize("name", ["int4_g32", "int4_asym_g64", "int8_channel"])
def test_the_error_that_counts_gets_smaller(name: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 256)).astype(np.float32)
    importance = (rng.standard_normal(256) ** 8 + 0.01).astype(np.float32)  # a few columns matter most, as in models

    def counted(chosen: np.ndarray | None) -> float:
        error = quantize_rtn(weight, SCHEMES[name], chosen).dequantize() - weight
        return float((np.square(error, dtype=np.float64) * importance).sum())

    assert counted(importance) < 0.9 * counted(None)


def test_equal_importance_changes_nothing() -> None:
    weight = np.random.default_rng(1).standard_normal((8, 128)).astype(np.float32)
    plain, weighted = (quantize_rtn(weight, SCHEMES["int4_g32"], chosen) for chosen in (None, np.ones(128, np.float32)))
    np.testing.assert_array_equal(plain.codes, weighted.codes)
    np.testing.assert_array_equal(plain.scale, weighted.scale)


def test_a_model_without_finite_values_is_named(tmp_path: Path) -> None:
    graph = load_graph(make_checkpoint("phi3_medium_gqa", tmp_path))
    broken = graph.weights["blocks.1.mlp_up"]
    path, offset = broken.source.location
    with Path(path).open("r+b") as file:
        file.seek(offset)
        file.write(np.float32(np.nan).tobytes()[2:] * broken.shape[1])  # a row of bf16 NaN
    with pytest.raises(ModelError, match=r"no finite values.*input of blocks\.1\.mlp_out"):
        random_token_importance(graph, 4, 0)


@pytest.mark.parametrize("square", [1e39, np.inf, np.nan])
def test_squares_beyond_float32_are_named(tmp_path: Path, square: float) -> None:
    node = load_graph(make_checkpoint("phi3_medium_gqa", tmp_path)).nodes[-1]
    with pytest.raises(ModelError, match=r"on text .*input of logits.*beyond float32"):
        importance_at(node, np.array([square, 1]), "text")


def test_a_pruned_layer_has_columns_that_count_alike(tmp_path: Path) -> None:
    graph = load_graph(make_checkpoint("phi3_medium_gqa", tmp_path))
    for name in ("blocks.1.mlp_gate", "blocks.1.mlp_up"):
        pruned = graph.weights[name]
        path, offset = pruned.source.location
        with Path(path).open("r+b") as file:
            file.seek(offset)
            file.write(bytes(2 * pruned.shape[0] * pruned.shape[1]))
    importance = random_token_importance(graph, 4, 0)
    np.testing.assert_array_equal(importance["blocks.1.mlp_down"], 1)
    assert np.ptp(importance["blocks.0.mlp_down"]) > 0 and np.ptp(importance["lm_head"]) > 0
