"""Mixes choose the types that llama-quantize chooses.

data/llama_quantize_types.json is what `llama-quantize --dry-run MODEL MIX` printed (the llama.cpp that llama-cpp-python
0.3.36 carries) for models of these shapes: "q4_k*2 q6_k" is layers 0 and 1, then layer 2. `calibrated` is with
--imatrix, recorded where it changes anything.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf")

from converters.architectures import llama, phi3
from converters.config import ModelConfig
from converters.graph import Graph
from converters.passes.assign import assign_schemes
from converters.quantize.ggml.mixes import FUSED_QKV, MIXES
from converters.tensors import TensorTable
from exporters.gguf.tensors import ARCHITECTURES, gguf_tensors
from tests.converters.arrays import ArraySource
from tests.exporters.tiny_graphs import BASE, PLAIN

TYPES: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parents[3] / "data" / "llama_quantize_types.json").read_text(encoding="utf-8")
)
PHI3 = replace(
    BASE, hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=4, head_dim=64, rope=replace(PLAIN, dim=64)
)
LLAMA = replace(PHI3, family="llama")
NARROW = {"hidden_size": 576, "intermediate_size": 1536, "num_heads": 9, "num_kv_heads": 3}  # as the sample's
CONFIGS = {
    "phi3": replace(PHI3, num_layers=32),
    "phi3_tied_gqa4": replace(PHI3, num_layers=20, num_kv_heads=1, tie_embeddings=True),
    "phi3_narrow": replace(PHI3, num_layers=30, tie_embeddings=True, **NARROW),  # type: ignore[arg-type]
    "llama": replace(LLAMA, num_layers=16),
    "llama_gqa4": replace(LLAMA, num_layers=33, num_kv_heads=1),
    "llama_tied_gqa2": replace(LLAMA, num_layers=11, num_kv_heads=2, tie_embeddings=True),
    "llama_70b": replace(LLAMA, num_layers=80, num_kv_heads=2),
    "llama_odd": replace(LLAMA, num_layers=8, hidden_size=320, num_heads=5, num_kv_heads=5, intermediate_size=768),
}


class Shapes(TensorTable):
    """A checkpoint with every tensor asked for, and no numbers worth reading."""

    def take(self, name: str, shape: tuple[int, ...]) -> ArraySource:  # type: ignore[override]  # in memory, not in a file
        return ArraySource(np.broadcast_to(np.float32(0), shape))


@cache
def graph_of(name: str) -> Graph:
    return build(CONFIGS[name])


def build(config: ModelConfig) -> Graph:
    return (phi3.build if config.family == "phi3" else llama.build)(config, Shapes({}))


def chosen(graph: Graph) -> str:
    """The types of a graph's matrices in the notation of the recorded ones."""
    kinds: dict[str, dict[int, str]] = defaultdict(dict)
    for tensor in gguf_tensors(graph):
        if len(tensor.shape) == 2:
            layer, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()  # type: ignore[union-attr]
            kinds[kind][int(layer or 0)] = tensor.type.name.lower()
    runs = {
        kind: [(name, len(list(each))) for name, each in itertools.groupby(layers.values())]
        for kind, layers in kinds.items()
    }
    return "; ".join(
        f"{kind} {' '.join(name if count == 1 else f'{name}*{count}' for name, count in runs[kind])}"
        for kind in sorted(kinds, key=lambda kind: (kind not in ("output", "token_embd"), kind))
    )


@pytest.mark.parametrize("calibrated", [False, True], ids=["", "calibrated"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("mix", MIXES)
def test_the_types_are_those_that_llama_quantize_chose(mix: str, config: str, calibrated: bool) -> None:
    recorded = TYPES[config]
    expected = recorded.get(f"{mix} calibrated", recorded[mix]) if calibrated else recorded[mix]
    assert chosen(assign_schemes(graph_of(config), MIXES[mix], {}, calibrated)) == expected


def test_every_record_is_of_a_mix_and_a_shape_under_test() -> None:
    assert TYPES.keys() == CONFIGS.keys()
    assert {key.removesuffix(" calibrated") for records in TYPES.values() for key in records} == MIXES.keys()
    assert {name for records in TYPES.values() for name in records if "calibrated" in name} == {
        "q4_0 calibrated",
        "q5_0 calibrated",
        "iq4_nl calibrated",
        "iq4_xs calibrated",
    }


def test_80_layers_without_grouped_queries_are_no_70b() -> None:
    """llama-quantize gives the attn_v of such a `llama`, which it takes for a 65B, the mix's own type."""
    graph = build(replace(LLAMA, num_layers=80))
    assert "attn_v q3_k*80" in chosen(assign_schemes(graph, MIXES["q3_k_s"], {}))
    assert "attn_v q5_k*80" in TYPES["llama_70b"]["q3_k_s"]


def test_families_with_fused_projections_are_those_that_gguf_fuses() -> None:
    assert {family for family, architecture in ARCHITECTURES.items() if architecture == "phi3"} == FUSED_QKV


def test_rows_that_no_block_divides_are_floats() -> None:
    """llama-quantize refuses such models for some mixes; fp16 is its answer where it has one."""
    graph = build(replace(LLAMA, intermediate_size=1000))
    for mix in MIXES.values():
        assert "ffn_down f16*2" in chosen(assign_schemes(graph, mix, {}))
