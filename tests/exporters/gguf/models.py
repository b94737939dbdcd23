"""Tiny random models of every shape that llama.cpp treats differently, and their artifacts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from converters.config import ModelConfig, RopeKind
from converters.graph import Graph, Node
from converters.ops import Attention
from exporters.base import Layout, Model, Target
from exporters.gguf.exporter import EXPORTER
from tests.exporters.tiny_graphs import BASE, LLAMA3, PLAIN, longrope
from tundish.pour import pour

ORIGINAL = 256  # the smallest context that llama.cpp allocates: shorter ones would never see the short factors
LLAMA = replace(BASE, family="llama", num_kv_heads=2)

CONFIGS: dict[str, ModelConfig] = {
    "phi3": BASE,
    "phi3_longrope": replace(BASE, rope=longrope(ORIGINAL, 12), context_length=ORIGINAL),
    "phi3_gqa_tied": replace(BASE, rope=replace(PLAIN, dim=12), num_kv_heads=2, tie_embeddings=True),
    "phi3_linear": replace(BASE, rope=replace(PLAIN, kind=RopeKind.LINEAR, factor=4.0)),
    "llama": replace(LLAMA, num_kv_heads=4),
    "llama_gqa_llama3_tied": replace(LLAMA, rope=LLAMA3, tie_embeddings=True),
    "llama_linear": replace(LLAMA, rope=replace(PLAIN, kind=RopeKind.LINEAR, factor=4.0)),
    "mistral_wide_heads": replace(LLAMA, family="mistral", head_dim=32, rope=replace(PLAIN, dim=32)),
}

# Rows of 256 and more values, so that the types of 256 values a block are stored as what they are.
_WIDE = replace(BASE, hidden_size=256, intermediate_size=512, head_dim=64, rope=replace(PLAIN, dim=64))
WIDE_CONFIGS: dict[str, ModelConfig] = {
    "phi3_wide": _WIDE,
    "phi3_wide_tied": replace(_WIDE, tie_embeddings=True),
    "llama_wide_gqa": replace(_WIDE, family="llama", num_kv_heads=1),
}


def with_long_factors(graph: Graph) -> Graph:
    """The model if LongRoPE's long factors were used at every length."""

    def change(node: Node) -> Node:
        op = node.op
        if not isinstance(op, Attention) or op.rope is None:
            return node
        return replace(node, op=replace(op, rope=replace(op.rope, short_factors=op.rope.long_factors)))

    return replace(graph, nodes=tuple(change(node) for node in graph.nodes))


def layout_of(model: Model) -> Layout:
    EXPORTER.check(model, EXPORTER.options())
    return EXPORTER.layout(model, EXPORTER.options())


def write_artifact(model: Model, folder: Path) -> Path:
    """The folder of the finished artifact."""
    pour(model.graph, {Target.GGUF: layout_of(model)}, folder)
    return folder / Target.GGUF
