"""llama.cpp's importance matrix for a graph: its entries are named like the tensors of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from converters.errors import UsageError
from converters.graph import Graph
from converters.ops import Linear
from converters.quantize.imatrix import ImportanceMatrix
from converters.quantize.importance import importance_of
from converters.quantize.scheme import FP32
from converters.quantize.tensor import F32
from exporters.gguf.tensors import gguf_tensors

_SHOWN = 4


def imatrix_importance(matrix: ImportanceMatrix, graph: Graph, where: str) -> dict[str, F32]:
    """Importance f32[in] by weight name, with mean 1 and a small floor, as random_token_importance gives it.

    The head is left out where the matrix leaves it out, which llama-imatrix does unless told otherwise. UsageError,
    naming what differs, if the matrix is of another model; `where` is its file.
    """
    names = imatrix_names(graph)
    found = {weight: next((name for name in known if name in matrix.means), None) for weight, known in names.items()}
    head = {name for node in graph.nodes[-1:] if isinstance(node.op, Linear) for name in node.op.weights}
    absent = [names[weight][0] for weight, name in found.items() if name is None and weight not in head]
    foreign = matrix.means.keys() - {name for known in names.values() for name in known}
    differing = [f"no {_listed(absent)}"] if absent else []
    differing += [f"{_listed(sorted(foreign))}, which this model has not"] if foreign else []
    if differing:
        raise _other_model(where, "an entry for each matrix", "; ".join(differing))
    importance = {}
    for weight, name in found.items():
        if name is None:
            continue
        means, width = matrix.means[name], graph.weights[weight].shape[-1]
        if means.shape != (width,):
            raise _other_model(f"{where}: {name}", f"{width} columns", str(means.size))
        if not means.any():
            raise UsageError(
                "the importance matrix says that nothing ever reaches a matrix",
                where=f"{where}: {name}",
                found="zeros only",
                mend="Make it anew, with more text.",
            )
        importance[weight] = importance_of(means)
    return importance


def imatrix_means(squares: Mapping[str, NDArray[np.floating]], graph: Graph) -> dict[str, F32]:
    """The entries f32[in] of a matrix, by GGUF tensor name, of mean squares [in] by weight name.

    The head has one too, as with llama-imatrix's --process-output; a tied one is called token_embd.weight.
    """
    return {names[0]: squares[weight].astype(np.float32) for weight, names in imatrix_names(graph).items()}


def imatrix_names(graph: Graph) -> Mapping[str, tuple[str, ...]]:
    """What the entry of each matrix that a Linear uses may be called, by weight name.

    Parts of a fused tensor share an entry, since they share their input; llama.cpp's phi3 has q, k and v fused or
    apart. The graph's own schemes do not matter: the entries were measured on another file of the model.
    """
    names: dict[str, tuple[str, ...]] = {}
    used = {name for node in graph.nodes if isinstance(node.op, Linear) for name in node.op.weights}
    for tensor in gguf_tensors(graph.map_weights(lambda weight: replace(weight, scheme=FP32))):
        for part in tensor.parts:
            if part.name not in used:
                continue
            names[part.name] = (tensor.name,)
            if len(tensor.parts) == 3:  # attn_qkv
                block, role = part.name.removeprefix("blocks.").split(".")
                names[part.name] += (f"blk.{block}.{role}.weight",)
    return names


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


def _other_model(where: str, expected: str, found: str) -> UsageError:
    return UsageError(
        "the importance matrix is of another model",
        where=where,
        expected=expected,
        found=found,
        mend="Give the one that llama-imatrix made of this model.",
    )
