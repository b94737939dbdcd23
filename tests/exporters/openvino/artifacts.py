"""Small models poured into OpenVINO IR, and run by OpenVINO step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov

from converters.quantize.tensor import F32
from exporters.base import Model, Target
from exporters.openvino.exporter import EXPORTER, network_layout
from exporters.openvino.runtime import EXACT
from exporters.options import OpenvinoOptions
from tundish.pour import pour


def write_network(model: Model, folder: Path, options: OpenvinoOptions | None = None) -> Path:
    """A folder with the model alone, which is quicker than the complete artifact."""
    pour(model.graph, {Target.OPENVINO: network_layout(model, options or OpenvinoOptions())}, folder)
    return folder / Target.OPENVINO


def write_artifact(model: Model, folder: Path, options: OpenvinoOptions | None = None) -> Path:
    """The complete folder."""
    pour(model.graph, {Target.OPENVINO: EXPORTER.layout(model, options or OpenvinoOptions())}, folder)
    return folder / Target.OPENVINO


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
