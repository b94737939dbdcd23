"""Small models poured into the MLX container."""

from __future__ import annotations

from pathlib import Path

from exporters.base import Model, Target
from exporters.mlx.exporter import EXPORTER
from exporters.options import MlxOptions
from tundish.pour import pour


def export(model: Model, folder: Path, options: MlxOptions | None = None) -> Path:
    """The artifact's folder, written by the pour."""
    pour(model.graph, {Target.MLX: EXPORTER.layout(model, options or MlxOptions())}, folder)
    return folder / Target.MLX
