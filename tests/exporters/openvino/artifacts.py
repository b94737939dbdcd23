"""Small models poured into OpenVINO IR, run by OpenVINO and by the interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import openvino as ov

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
from exporters.openvino.exporter import EXPORTER, network_layout
from exporters.openvino.runtime import EXACT
from exporters.options import OpenvinoOptions
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
    """The tiny model of that name. Its tokenizer is of another size: tests choose ids directly."""
    graph = load_graph(make_checkpoint(name, folder / "checkpoint"))
    by_role = {role: scheme_named(each) for role, each in (overrides or {}).items()}
    graph = assign_schemes(graph, scheme_named(scheme), by_role)
    tokenizer = read_tokenizer(folder / "tokenizer", write_byte_level(folder / "tokenizer", None))
    return Model(graph, tokenizer, context or graph.config.context_length, name, None, {"temperature": 0.5})


def write_network(model: Model, folder: Path, options: OpenvinoOptions | None = None) -> Path:
    """A folder with the model alone, which is quicker than the complete artifact."""
    pour(model.graph, {Target.OPENVINO: network_layout(model, options or OpenvinoOptions())}, folder)
    return folder / Target.OPENVINO


def write_artifact(model: Model, folder: Path, options: OpenvinoOptions | None = None) -> Path:
    """The complete folder."""
    pour(model.graph, {Target.OPENVINO: EXPORTER.layout(model, options or OpenvinoOptions())}, folder)
    return folder / Target.OPENVINO


def canonical(weight: Weight) -> F32:
    """What every container must hold: the weight under its scheme."""
    return dequantize(quantize_rows(weight, 0, weight.shape[0]))


def reference_logits(model: Model, token_ids: Sequence[int]) -> F32:
    """f32[length, vocab] by the interpreter over the canonical weights."""
    logits: F32 = interpret(model.graph, np.array([token_ids], np.int64), canonical)[0]
    return logits


def random_ids(model: Model, length: int) -> list[int]:
    return [int(each) for each in np.random.default_rng(length).integers(3, model.graph.config.vocab_size, length)]


def compile_network(folder: Path) -> ov.CompiledModel:
    return ov.Core().compile_model(folder / "openvino_model.xml", "CPU", dict(EXACT))


def step(request: ov.InferRequest, rows: Sequence[Sequence[int]], past: int, masked: int = 0) -> F32:
    """f32[batch, length, vocab] of the next tokens of each row; the first `masked` positions of row 0 are padding."""
    length = len(rows[0])
    mask = np.ones((len(rows), past + length), np.int64)
    mask[0, :masked] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, past:]
    inputs = {
        "input_ids": np.array(rows, np.int64),
        "attention_mask": mask,
        "position_ids": positions,
        "beam_idx": np.arange(len(rows), dtype=np.int32),
    }
    return np.array(request.infer(inputs)[0], np.float32)
