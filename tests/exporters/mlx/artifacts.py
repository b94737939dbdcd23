"""Small models poured into the MLX container, with a tokenizer that mlx-lm can open."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from converters.graph import Weight
from converters.interpret import interpret
from converters.load import load_graph
from converters.passes.assign import assign_schemes
from converters.quantize.block import dequantize, quantize_rows
from converters.quantize.scheme import scheme_named
from converters.quantize.tensor import F32
from converters.role import Role
from converters.tokenizer import read_tokenizer
from exporters.base import Model, Target
from exporters.mlx.exporter import EXPORTER
from exporters.options import MlxOptions
from tests.converters.tiny_models import make_checkpoint
from tests.converters.tiny_tokenizers import write_byte_level
from tundish.pour import pour


def make_model(
    name: str,
    folder: Path,
    scheme: str = "fp32",
    overrides: Mapping[Role, str] | None = None,
    context: int | None = None,
) -> Model:
    """The tiny model of that name with schemes assigned. Its tokenizer has another size: tests choose ids."""
    graph = load_graph(make_checkpoint(name, folder / "checkpoint"))
    by_role = {role: scheme_named(each) for role, each in (overrides or {}).items()}
    graph = assign_schemes(graph, scheme_named(scheme), by_role)
    tokenizer = read_tokenizer(folder / "tokenizer", write_byte_level(folder / "tokenizer", None))
    return Model(graph, tokenizer, context or graph.config.context_length, name, None, {"temperature": 0.5})


def export(model: Model, folder: Path, options: MlxOptions | None = None) -> Path:
    """The artifact's folder, written by the pour."""
    pour(model.graph, {Target.MLX: EXPORTER.layout(model, options or MlxOptions())}, folder)
    return folder / Target.MLX


def canonical(weight: Weight) -> F32:
    """What every container must hold: the weight under its scheme."""
    return dequantize(quantize_rows(weight, 0, weight.shape[0]))


def reference_logits(model: Model, token_ids: list[int]) -> F32:
    """f32[length, vocab] by the interpreter over the canonical weights."""
    logits: F32 = interpret(model.graph, np.array([token_ids], np.int64), canonical)[0]
    return logits


def random_ids(model: Model, length: int) -> list[int]:
    return [int(each) for each in np.random.default_rng(length).integers(0, model.graph.config.vocab_size, length)]
