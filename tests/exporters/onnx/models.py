"""Tiny random models of every shape that the ONNX exporter lowers differently, and their artifacts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from converters.config import ModelConfig
from converters.graph import Graph
from converters.passes.assign import assign_schemes
from converters.quantize.scheme import SCHEMES
from converters.role import Role
from exporters.base import Layout, Model, Target
from exporters.onnx.exporter import EXPORTER
from exporters.options import OnnxOptions
from tests.exporters.tiny_graphs import BASE, LLAMA3, PLAIN, longrope, random_graph
from tundish.pour import pour

ORIGINAL = 40
LONG = longrope(ORIGINAL, 16)
SMALL = replace(BASE, hidden_size=128, intermediate_size=192, num_layers=2, context_length=128)
CONFIGS: dict[str, ModelConfig] = {
    "plain": SMALL,
    "longrope": replace(SMALL, rope=LONG, context_length=ORIGINAL),
    "longrope_long": replace(SMALL, rope=LONG),
    "longrope_long_partial_tied": replace(SMALL, rope=longrope(ORIGINAL, 12), num_kv_heads=2, tie_embeddings=True),
    "gqa": replace(SMALL, num_kv_heads=1),
    "partial_rotary": replace(SMALL, rope=replace(PLAIN, dim=12)),
    "window": replace(SMALL, sliding_window=9),
    "llama3_tied": replace(SMALL, family="llama", rope=LLAMA3, num_kv_heads=2, tie_embeddings=True),
    "head_wider_than_hidden": replace(SMALL, family="llama", head_dim=64, rope=replace(PLAIN, dim=64)),
}


def graph_of(name: str, scheme: str = "fp32", **overrides: str) -> Graph:
    """A random graph with this scheme, and others for the roles named."""
    roles = {Role(role): SCHEMES[value] for role, value in overrides.items()}
    return assign_schemes(random_graph(CONFIGS[name]), SCHEMES[scheme], roles)


def layout_of(model: Model, options: OnnxOptions) -> Layout:
    EXPORTER.check(model, options)
    return EXPORTER.layout(model, options)


def write_artifact(model: Model, folder: Path, options: OnnxOptions | None = None) -> Path:
    """The artifact's folder."""
    pour(model.graph, {Target.ONNX: layout_of(model, options or OnnxOptions())}, folder)
    return folder / Target.ONNX
