"""Schemes are assigned by role, and never in place."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.load import load_graph
from converters.passes.assign import assign_schemes, requested_scheme
from converters.quantize.scheme import FP16, FP32, SCHEMES
from converters.role import Role
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
