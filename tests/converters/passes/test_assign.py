"""Schemes are assigned by role, and never in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters.load import load_graph
from converters.passes.assign import assign_schemes, requested_scheme
from converters.quantize.ggml.mixes import MIXES
from converters.quantize.scheme import FP16, FP32, SCHEMES
from converters.role import Role
from tests.converters.arrays import ArraySource
from tests.converters.tiny_models import make_checkpoint

INT4, INT8 = SCHEMES["int4_g128"], SCHEMES["int8_g32"]


@pytest.mark.parametrize("variant", ["phi3_medium_gqa", "phi4_mini"])
def test_rules(tmp_path: Path, variant: str) -> None:
    graph = load_graph(make_checkpoint(variant, tmp_path))
    assigned = assign_schemes(graph, INT4, {Role.LM_HEAD: INT8, Role.MLP_DOWN: FP16})
    assert {weight.scheme for weight in graph.weights.values()} == {FP32}, "the input graph stays as it was"
    names = {weight.role: weight.scheme.name for weight in assigned.weights.values()}
    assert names[Role.NORM] == "fp32"
    assert names[Role.MLP_DOWN] == "fp16"
    assert names[Role.ATTN_Q] == "int4_g64", "64 columns: the group of 128 is halved once"
    # Tied, the matrix takes the more precise of embedding (int4) and head (int8); else each its own.
    assert names[Role.EMBEDDING] == ("int8_g32" if graph.config.tie_embeddings else "int4_g64")
    q = graph.weights["blocks.0.attn_q"]
    assert requested_scheme(graph, q, INT4, {}) is INT4


def test_overrides_win_over_a_mix(tmp_path: Path) -> None:
    graph = load_graph(make_checkpoint("phi3_medium_gqa", tmp_path))  # rows of 64: every K type falls back
    assigned = assign_schemes(graph, MIXES["q4_k_m"], {Role.MLP_DOWN: FP16, Role.LM_HEAD: SCHEMES["q6_k"]})
    names = {weight.role: weight.scheme.name for weight in assigned.weights.values()}
    assert names[Role.NORM] == "fp32"
    assert names[Role.MLP_DOWN] == "fp16"
    assert names[Role.MLP_UP] == names[Role.EMBEDDING] == "q5_0", "instead of q4_k"
    assert names[Role.LM_HEAD] == "q8_0", "instead of q6_k"
    up = graph.weights["blocks.0.mlp_up"]
    assert requested_scheme(graph, up, MIXES["q4_k_m"], {}) is SCHEMES["q4_k"]


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ({}, "q6_k"),
        ({Role.EMBEDDING: "q4_k"}, "q4_k"),
        ({Role.LM_HEAD: "q4_k"}, "q4_k"),
        ({Role.EMBEDDING: "q4_k", Role.LM_HEAD: "q5_k"}, "q5_k"),
    ],
)
def test_a_mix_gives_a_tied_embedding_its_output_type_unless_overridden(
    overrides: dict[Role, str], found: str, tmp_path: Path
) -> None:
    graph = load_graph(make_checkpoint("phi4_mini", tmp_path))
    assert graph.config.tie_embeddings
    embedding = next(weight for weight in graph.weights.values() if weight.role is Role.EMBEDDING)
    wide = replace(embedding, source=ArraySource(np.zeros((4, 256), np.float32)))
    by_role = {role: SCHEMES[name] for role, name in overrides.items()}
    assert requested_scheme(graph, wide, MIXES["q4_k_s"], by_role) is SCHEMES[found]
