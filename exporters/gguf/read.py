"""A GGUF file back to canonical weights, through gguf-py's dequantizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from converters.errors import GateError
from converters.gguf_file import read_gguf
from converters.graph import Graph
from converters.quantize.tensor import F32
from exporters.gguf.pack import interleaved_rows
from exporters.gguf.tensors import GgufTensor, gguf_tensors


def read_weights(path: Path, graph: Graph) -> Iterator[tuple[str, F32]]:
    """(name, f32[out, in]) of every matrix of the graph. Memory-mapped: one tensor is in memory at a time."""
    stored = read_gguf(path)
    for tensor in gguf_tensors(graph):
        if len(tensor.shape) != 2:
            continue
        if tensor.name not in stored.tensors:
            raise GateError("a tensor is missing from the artifact", where=f"{path.name}, {tensor.name}")
        yield from _split(tensor, stored.values(tensor.name).reshape(tensor.shape))


def _split(tensor: GgufTensor, rows: F32) -> Iterator[tuple[str, F32]]:
    start = 0
    for part in tensor.parts:
        stop = start + part.shape[0]
        piece = rows[start:stop]
        if tensor.head_dim is not None:
            piece = piece[np.argsort(interleaved_rows(part.shape[0], tensor.head_dim))]
        yield part.name, piece
        start = stop
