"""From a checkpoint folder to a complete Graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from converters.architectures import llama, phi3
from converters.checkpoint import open_checkpoint
from converters.config import ModelConfig, read_config
from converters.graph import Graph
from converters.tensor_names import canonical
from converters.tensors import TensorTable

# model_type of config.json -> the function that builds the graph.
ARCHITECTURES: dict[str, Callable[[ModelConfig, TensorTable], Graph]] = {
    "phi3": phi3.build,
    "llama": llama.build,
    "mistral": llama.build,
}


def load_graph(folder: Path) -> Graph:
    """The graph of a checkpoint; reads headers and config.json, and weights only to see whether a tied head is its
    embedding. ModelError if anything does not fit.

    Its LongRoPE is that of texts within the original context; converters.passes.context makes it that of longer ones.
    """
    config = read_config(folder)
    return ARCHITECTURES[config.family](config, TensorTable(canonical(open_checkpoint(folder))))
