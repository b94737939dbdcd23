"""Tiny random models of every shape that the ONNX exporter lowers differently, and their artifacts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from converters.config import ModelConfig, Rope
from converters.graph import Graph
from converters.interpret import interpret
from converters.passes.assign import assign_schemes
from converters.quantize.block import dequantize, quantize_rows
from converters.quantize.scheme import SCHEMES
from converters.quantize.tensor import F32
from converters.role import Role
from exporters.base import Layout, Model, Target
from exporters.onnx.exporter import EXPORTER
from exporters.options import OnnxOptions
from tests.exporters.gguf.models import BASE, LLAMA3, LONGROPE, PLAIN, byte_tokenizer, random_graph
from tundish.pour import pour

ORIGINAL = 40
LONG = replace(LONGROPE, original_context=ORIGINAL)


def wide(rope: Rope, dim: int) -> Rope:
    """LongRoPE for `dim` rotated dimensions."""
    pairs = range(dim // 2)
    short = tuple(1 + 0.05 * i for i in pairs)
    return replace(rope, dim=dim, short_factors=short, long_factors=tuple(1.1 + 2.5 * i for i in pairs))


SMALL = replace(BASE, hidden_size=128, intermediate_size=192, num_layers=2, context_length=128)
CONFIGS: dict[str, ModelConfig] = {
    "plain": SMALL,
    "longrope_switch": replace(SMALL, rope=wide(LONG, 16)),
    "longrope_switch_partial_tied": replace(SMALL, rope=LONG, num_kv_heads=2, tie_embeddings=True),
    "longrope_short_only": replace(SMALL, rope=replace(wide(LONG, 16), original_context=128)),
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


def model_of(graph: Graph, **changes: object) -> Model:
    base = Model(graph, byte_tokenizer(), graph.config.context_length, "Tiny")
    return replace(base, **changes)  # type: ignore[arg-type]


def layout_of(model: Model, options: OnnxOptions) -> Layout:
    EXPORTER.check(model, options)
    return EXPORTER.layout(model, options)


def write_artifact(model: Model, folder: Path, options: OnnxOptions | None = None) -> Path:
    """The artifact's folder."""
    pour(model.graph, {Target.ONNX: layout_of(model, options or OnnxOptions())}, folder)
    return folder / Target.ONNX


def expected_logits(graph: Graph, token_ids: list[int]) -> F32:
    """f32[length, vocab] from the very numbers that the artifact stores."""
    read = lambda weight: dequantize(quantize_rows(weight, 0, weight.shape[0]))  # noqa: E731
    return interpret(graph, np.array([token_ids]), read)[0]


def random_ids(graph: Graph, length: int) -> list[int]:
    return [int(each) for each in np.random.default_rng(length).integers(0, graph.config.vocab_size, length)]


def divergence(expected: F32, found: F32) -> float:
    """The mean Kullback-Leibler divergence in nats."""
    p, q = log_softmax(expected), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def log_softmax(logits: F32) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
