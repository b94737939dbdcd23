"""The proof of the graph: its logits are those of transformers, and every setting of a model matters to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from converters.config import ModelConfig, RopeKind, read_config
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


Change = Callable[[dict[str, Any]], dict[str, Any]]  # of torch's tensors by name


def rewrite_tensors(folder: Path, change: Change) -> Path:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in change(load_file(path)).items()}, path)
    return folder


def assert_like_transformers(folder: Path, length: int = 20) -> Graph:
    graph = load_graph(folder)
    ids = token_ids(graph, length)
    expected = tiny_models.reference_logits(folder, torch.from_numpy(ids)).numpy()
    assert np.abs(expected).max() > 1
    assert np.abs(interpret(graph, ids) - expected).max() <= 1e-4
    return graph


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_stored_head_that_is_the_embedding_is_dropped_by_name(tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint("smollm2", tmp_path)
    rewrite_tensors(folder, lambda tensors: tensors | {HEAD: tensors[EMBEDDING].float()})
    graph = assert_like_transformers(folder)
    assert graph.dropped == {HEAD: "tied to the embedding"}
    assert (graph.config.tie_embeddings, graph.config.notes) == (True, ())


@pytest.mark.parametrize("name", ["llama2", "phi4", "mistral"])
def test_head_that_differs_from_its_embedding_is_not_tied(tmp_path: Path, name: str) -> None:
    folder = rewrite_config(tiny_models.make_checkpoint(name, tmp_path), tie_word_embeddings=True)
    graph = assert_like_transformers(folder)
    assert graph.dropped == {}
    assert "lm_head" in graph.weights
    assert not graph.config.tie_embeddings
    assert "they are not tied" in graph.config.notes[0]


def test_head_alone_is_the_embedding_too(tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint("smollm2", tmp_path)
    rewrite_tensors(folder, lambda tensors: {HEAD if name == EMBEDDING else name: t for name, t in tensors.items()})
    graph = assert_like_transformers(folder)
    assert [node.name for node in graph.consumers("embedding")] == ["embedded", "logits"]


def renamed(rename: Callable[[str], str]) -> Change:
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["phi3_mini_4k", "llama2"])
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: "_orig_mod." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: "base_model.model." + name,
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    ],
    ids=["compiled", "parallel", "peft", "inner", "fsdp"],
)
def test_known_spellings_of_names(tmp_path: Path, name: str, rename: Callable[[str], str]) -> None:
    plain = load_graph(tiny_models.make_checkpoint(name, tmp_path))
    ids = token_ids(plain, 6)
    expected = interpret(plain, ids)
    graph = load_graph(rewrite_tensors(tmp_path, renamed(rename)))
    assert graph.dropped == {}
    assert np.array_equal(interpret(graph, ids), expected)


def test_names_that_come_to_the_same_are_refused(tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint("llama2", tmp_path)
    rewrite_tensors(folder, lambda tensors: tensors | {"_orig_mod." + HEAD: tensors[HEAD]})
    with pytest.raises(ModelError, match=r"the same one \(lm_head.weight\); found .*_orig_mod.lm_head.weight"):
        load_graph(folder)


def test_unknown_prefix_is_shown(tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint("llama2", tmp_path)
    rewrite_tensors(folder, renamed(lambda name: "thinker." + name))
    with pytest.raises(ModelError, match=r"missing.*found in its place thinker.model.embed_tokens.weight.*prefix"):
        load_graph(folder)


def test_unmerged_adapter_is_told(tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint("llama2", tmp_path)
    q = "model.layers.0.self_attn.q_proj"
    wrapped = renamed(lambda name: "base_model.model." + name.replace(q, q + ".base_layer"))
    lora = {f"base_model.model.{q}.lora_A.default.weight": torch.zeros(2, 64)}
    rewrite_tensors(folder, lambda tensors: wrapped(tensors) | lora)
    with pytest.raises(ModelError, match="merge_and_unload"):
        load_graph(folder)


@pytest.mark.parametrize("name", ["phi3_mini_128k", "llama3_1", "mistral"])
def test_buffers_of_the_rotary_embedding_are_dropped(tmp_path: Path, name: str) -> None:
    folder = tiny_models.make_checkpoint(name, tmp_path)
    buffers = [
        "model.rotary_emb.inv_freq",
        "rotary_emb.original_inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
    ]
    buffers += [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    rewrite_tensors(folder, lambda tensors: tensors | {buffer: torch.zeros(8) for buffer in buffers})
    graph = assert_like_transformers(folder)
    assert len(graph.dropped) == len(buffers)
    assert set(graph.dropped.values()) == {"computed from config.json"}


def test_float64_weights(tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint("llama3_1", tmp_path)
    rewrite_tensors(folder, lambda tensors: {name: tensor.double() + 1e-12 for name, tensor in tensors.items()})
    assert_like_transformers(folder)


def old_spelling(config: dict[str, object]) -> dict[str, object]:
    """A config.json of transformers 5 as transformers 4.4x writes it."""
    rope = dict(config.pop("rope_parameters"))  # type: ignore[call-overload]
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = rope.pop("rope_theta")
    if (partial := rope.pop("partial_rotary_factor", None)) is not None:
        config["partial_rotary_factor"] = partial
    if config["model_type"] == "phi3":
        rope.pop("original_max_position_embeddings", None)
    rope.pop("type", None)
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return config | {"transformers_version": "4.46.0"}


@pytest.mark.parametrize("name", tiny_models.VARIANTS)
def test_config_of_transformers_4_is_the_same(name: str, tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint(name, tmp_path)
    saved = json.loads((folder / "config.json").read_text())
    assert "rope_theta" not in saved and "torch_dtype" not in saved
    config = read_config(folder)
    (folder / "config.json").write_text(json.dumps(old_spelling(saved)))
    assert read_config(folder) == config
    assert config.notes == ()


def test_original_context_inside_alone_as_transformers_computes_it(tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint("phi3_mini_128k", tmp_path)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["rope_parameters"]["original_max_position_embeddings"] == tiny_models.ORIGINAL_CONTEXT
    del saved["original_max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(saved))
    graph = assert_like_transformers(folder, 90)
    assert graph.config.rope.original_context == 4096


def test_window_that_llama_does_not_use(tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint("llama2", tmp_path)
    rewrite_config(folder, sliding_window=4, use_sliding_window=False, max_window_layers=1, my_note="tuned")
    assert_like_transformers(folder)


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
