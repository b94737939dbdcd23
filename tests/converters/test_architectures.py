"""The proof of the graph: its logits are those of transformers, and every setting of a model matters to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from converters.config import ModelConfig, RopeKind
from converters.errors import ModelError
from converters.graph import Graph, Weight
from converters.interpret import WeightRows, interpret
from converters.load import ARCHITECTURES, load_graph
from converters.ops import Attention
from converters.passes.context import for_context
from converters.quantize.tensor import F32
from converters.role import Role

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
tiny_models = pytest.importorskip("tests.converters.tiny_models")


def token_ids(graph: Graph, length: int, batch: int = 2) -> NDArray[np.int64]:
    return np.random.default_rng(length).integers(0, graph.config.vocab_size, (batch, length))


@pytest.mark.parametrize("name", tiny_models.VARIANTS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint(name, tmp_path)
    variant = tiny_models.VARIANTS[name]
    assert (folder / "model.safetensors.index.json").exists() == (variant.max_shard_size != "5GB")
    graph = load_graph(folder)
    assert next(iter(graph.weights.values())).source.dtype.name == str(variant.dtype).removeprefix("torch.")
    for length in variant.lengths:
        ids = token_ids(graph, length)
        expected = tiny_models.reference_logits(folder, torch.from_numpy(ids)).numpy()
        assert np.abs(expected).max() > 1, "logits too small to prove anything"
        found = interpret(for_context(graph, length), ids)  # transformers goes by the text's length
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() <= 1e-4, f"length {length}"


def test_every_architecture_is_proven() -> None:
    families = {variant.config_class.model_type for variant in tiny_models.VARIANTS.values()}
    assert families == set(ARCHITECTURES)


def change_attention(graph: Graph, **settings: object) -> Graph:
    """The graph with other constants in every attention."""
    nodes = [
        replace(node, op=replace(node.op, **settings)) if isinstance(node.op, Attention) else node  # type: ignore[arg-type]
        for node in graph.nodes
    ]
    return replace(graph, nodes=tuple(nodes))


def wrong_rope(config: ModelConfig) -> dict[str, dict[str, object]]:
    rope = config.rope
    return {
        "factors of the other context": {"rope": replace(rope, long=not rope.long)},
        "attention factor": {"rope": replace(rope, attention_factor=1.0)},
        "all dimensions rotated": {"rope": replace(rope, kind=RopeKind.DEFAULT, dim=config.head_dim)},
        "theta": {"rope": replace(rope, theta=500.0)},
        "window": {"window": 20},
    }


def test_the_proof_would_notice(tmp_path: Path) -> None:
    graph = load_graph(tiny_models.make_checkpoint("phi4_mini", tmp_path))
    ids = token_ids(graph, tiny_models.ORIGINAL_CONTEXT + 1)
    right = interpret(graph, ids)
    for name, settings in wrong_rope(graph.config).items():
        assert np.abs(interpret(change_attention(graph, **settings), ids) - right).max() > 0.01, name


def test_fused_projections_are_views_of_one_tensor(tmp_path: Path) -> None:
    graph = load_graph(tiny_models.make_checkpoint("phi3_medium_gqa", tmp_path))
    names = ("attn_q", "attn_k", "attn_v")
    parts = [WeightRows(graph.weights[f"blocks.1.{name}"])[:] for name in names]
    assert [part.shape for part in parts] == [(64, 64), (32, 64), (32, 64)]
    assert [graph.weights[f"blocks.1.{name}"].role for name in names] == [Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V]
    fused = load_file(tmp_path)["model.layers.1.self_attn.qkv_proj.weight"]
    assert np.array_equal(np.concatenate(parts), fused)


def load_file(folder: Path) -> dict[str, F32]:
    from safetensors.torch import load_file as load

    return {name: tensor.float().numpy() for name, tensor in load(folder / "model.safetensors").items()}


def test_tied_embedding_has_two_consumers(tmp_path: Path) -> None:
    graph = load_graph(tiny_models.make_checkpoint("smollm2", tmp_path))
    assert [node.name for node in graph.consumers("embedding")] == ["embedded", "logits"]
    assert "lm_head" not in graph.weights
    untied = load_graph(tiny_models.make_checkpoint("llama2", tmp_path / "untied"))
    assert [node.name for node in untied.consumers("embedding")] == ["embedded"]


def rewrite_config(folder: Path, **settings: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_stored_head_of_a_tied_model_is_dropped_by_name(tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint("llama2", tmp_path)
    graph = load_graph(rewrite_config(folder, tie_word_embeddings=True))
    assert graph.dropped == {"lm_head.weight": "tied to the embedding"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_hidden_layers": 1}, "does not use; found model.layers.1"),
        ({"num_hidden_layers": 3}, r"missing in the checkpoint \(model.layers.2"),
        ({"vocab_size": 161}, r"another shape.*embed_tokens.*\[161, 64\]; found \[160, 64\]"),
        ({"num_key_value_heads": 2}, "another shape.*k_proj"),
        ({"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "head_dim": 16}, "missing.*qkv_proj"),
    ],
)
def test_config_of_another_model(tmp_path: Path, settings: dict[str, object], words: str) -> None:
    folder = tiny_models.make_checkpoint("llama2", tmp_path)
    with pytest.raises(ModelError, match=words):
        load_graph(rewrite_config(folder, **{"mlp_bias": None, "pretraining_tp": None, **settings}))


def test_weights_can_be_read_from_elsewhere(tmp_path: Path) -> None:
    graph = load_graph(tiny_models.make_checkpoint("llama2", tmp_path))

    def silent_head(weight: Weight) -> F32:
        return WeightRows(weight)[:] * np.float32(weight.role is not Role.LM_HEAD)

    ids = token_ids(graph, 5)
    assert not interpret(graph, ids, silent_head).any()
    hidden = interpret(graph, ids, stop_at="final_normed")
    assert hidden.shape == (2, 5, 64)
    assert np.allclose(hidden @ WeightRows(graph.weights["lm_head"])[:].T, interpret(graph, ids), atol=1e-5)


@pytest.mark.slow
def test_sample_equals_transformers() -> None:
    from tundish.sample import cached_sample

    folder = cached_sample()
    graph = load_graph(folder)
    ids = token_ids(graph, 64, batch=1)
    expected = tiny_models.reference_logits(folder, torch.from_numpy(ids)).numpy()
    assert np.abs(interpret(graph, ids) - expected).max() <= 1e-3
