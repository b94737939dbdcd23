"""Importance matrices of llama.cpp on our graphs: the entries' names are the loader's, and other models are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters.config import ModelConfig
from converters.errors import UsageError
from converters.graph import Graph
from converters.ops import Linear
from converters.passes.assign import assign_schemes
from converters.quantize.ggml.mixes import MIXES
from converters.quantize.imatrix import ImportanceMatrix
from converters.quantize.tensor import F32
from exporters.gguf.importance import imatrix_importance, imatrix_names
from tests.exporters.gguf.models import CONFIGS, WIDE_CONFIGS
from tests.exporters.tiny_graphs import random_graph


def linear_weights(graph: Graph) -> set[str]:
    return {name for node in graph.nodes if isinstance(node.op, Linear) for name in node.op.weights}


def matrix_of(graph: Graph, spelling: int = 0) -> ImportanceMatrix:
    """An entry of its own for each name; of names that differ between files, the one with that index."""
    rng = np.random.default_rng(0)
    means: dict[str, F32] = {}
    for weight, names in imatrix_names(graph).items():
        name = names[min(spelling, len(names) - 1)]
        means.setdefault(name, rng.random(graph.weights[weight].shape[-1], np.float32))
    return ImportanceMatrix(means, 1, 512, ("text",))


def without(matrix: ImportanceMatrix, *names: str) -> ImportanceMatrix:
    return replace(matrix, means={name: values for name, values in matrix.means.items() if name not in names})


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_matrix_has_the_mean_squares_of_its_input(config: ModelConfig) -> None:
    graph = random_graph(config)
    for spelling in (0, 1):
        matrix = matrix_of(graph, spelling)
        importance = imatrix_importance(matrix, graph, "i.gguf")
        assert importance.keys() == linear_weights(graph)
        for weight, names in imatrix_names(graph).items():
            square = next(matrix.means[name] for name in names if name in matrix.means)
            np.testing.assert_allclose(importance[weight], square / square.mean() + 0.01, rtol=1e-6)


def test_names_are_the_file_s() -> None:
    fused, apart = imatrix_names(random_graph(CONFIGS["phi3"])), imatrix_names(random_graph(CONFIGS["llama"]))
    assert fused["blocks.1.attn_k"] == ("blk.1.attn_qkv.weight", "blk.1.attn_k.weight")
    assert fused["blocks.1.mlp_gate"] == fused["blocks.1.mlp_up"] == ("blk.1.ffn_up.weight",)
    assert apart["blocks.1.attn_k"] == ("blk.1.attn_k.weight",)
    assert apart["blocks.0.mlp_gate"] == ("blk.0.ffn_gate.weight",)
    assert fused["lm_head"] == ("output.weight",)
    assert imatrix_names(random_graph(CONFIGS["phi3_gqa_tied"]))["embedding"] == ("token_embd.weight",)


def test_schemes_do_not_matter() -> None:
    """A mix gives q, k and v types of their own, so its file has them apart; the matrix may have them fused."""
    graph = random_graph(WIDE_CONFIGS["phi3_wide"])
    mixed = assign_schemes(graph, MIXES["q4_k_m"], {}, True)
    assert imatrix_names(mixed) == imatrix_names(graph)


def test_the_head_may_be_absent() -> None:
    for name, head, entry in (("phi3", "lm_head", "output"), ("phi3_gqa_tied", "embedding", "token_embd")):
        graph = random_graph(CONFIGS[name])
        importance = imatrix_importance(without(matrix_of(graph), f"{entry}.weight"), graph, "i.gguf")
        assert importance.keys() == linear_weights(graph) - {head}


def test_another_model_is_refused() -> None:
    graph = random_graph(CONFIGS["phi3"])
    other = matrix_of(random_graph(replace(CONFIGS["phi3"], num_layers=3)))
    with pytest.raises(UsageError, match=r"another model \(i\.gguf\).*found blk\.2\..*has not"):
        imatrix_importance(other, graph, "i.gguf")
    with pytest.raises(UsageError, match=r"found no blk\.2\.attn_qkv\.weight"):
        imatrix_importance(matrix_of(graph), random_graph(replace(CONFIGS["phi3"], num_layers=3)), "i.gguf")
    with pytest.raises(UsageError, match=r"found no blk\.0\.attn_q\.weight, .* and 4 more; blk\.0\.attn_qkv"):
        imatrix_importance(matrix_of(graph), random_graph(CONFIGS["llama"]), "i.gguf")
    wide = matrix_of(random_graph(replace(CONFIGS["phi3"], intermediate_size=128)))
    with pytest.raises(UsageError, match=r"i\.gguf: blk\.0\.ffn_down\.weight.*expected 96 columns; found 128"):
        imatrix_importance(wide, graph, "i.gguf")


def test_a_matrix_that_nothing_reaches_is_named() -> None:
    graph = random_graph(CONFIGS["phi3"])
    matrix = matrix_of(graph)
    dead = replace(matrix, means={**matrix.means, "blk.1.attn_output.weight": np.zeros(64, np.float32)})
    with pytest.raises(UsageError, match=r"blk\.1\.attn_output\.weight.*zeros only"):
        imatrix_importance(dead, graph, "i.gguf")


def test_the_loader_agrees_on_the_names(tmp_path: Path) -> None:
    """A file we write has, for every matrix, a tensor of one of the names."""
    from gguf import GGUFReader

    from tests.exporters.gguf.models import write_artifact
    from tests.exporters.tiny_graphs import model_of

    for name in ("phi3", "llama"):
        graph = random_graph(CONFIGS[name])
        folder = write_artifact(model_of(graph), tmp_path / name)
        stored = {tensor.name for tensor in GGUFReader(folder / "model.gguf").tensors}
        assert all(stored & set(names) for names in imatrix_names(graph).values())
