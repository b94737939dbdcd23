"""Which GGUF tensors a graph becomes: names, types, and where each weight's rows lie in them.

The `phi3` architecture of llama.cpp wants gate and up fused as ffn_up, and q, k, v fused as attn_qkv or apart. The
`llama` architecture wants all apart, with the rows of q and k in interleaved RoPE order. Names follow gguf-py's
constants.py (TENSOR_NAMES).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.config import RopeKind
from converters.errors import UsageError
from converters.graph import Graph, Weight
from converters.quantize.tensor import F32
from converters.rope import frequency_divisors
from exporters.gguf.pack import ggml_type, row_nbytes


@dataclass(frozen=True, slots=True, eq=False)
class GgufTensor:
    """One tensor of the file: weights stacked along the output axis, or constant numbers (rope factors).

    `head_dim` is set if rows are to be interleaved within heads of that many rows.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # [out, in], or [n]
    parts: tuple[Weight, ...] = ()
    constant: F32 | None = None
    head_dim: int | None = None

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of a part; a part of a 1-D tensor has rows of one number."""
        return row_nbytes(self.type, self.shape[1] if len(self.shape) == 2 else 1)

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_nbytes


def gguf_tensors(graph: Graph) -> list[GgufTensor]:
    """Every tensor of the file, in file order. UsageError if parts of a fused tensor have different GGML types."""
    tensors = [*_rope_tensors(graph), _stack("token_embd", graph, "embedding")]
    for layer in range(graph.config.num_layers):
        tensors += _block_tensors(graph, layer)
    tensors.append(_stack("output_norm", graph, "final_norm"))
    if not graph.config.tie_embeddings:
        tensors.append(_stack("output", graph, "lm_head"))
    placed = [part.name for tensor in tensors for part in tensor.parts]
    assert sorted(placed) == sorted(graph.weights), "every weight has exactly one place"
    return tensors


# The loader's families -> llama.cpp's architectures.
ARCHITECTURES = {"phi3": "phi3", "llama": "llama", "mistral": "llama"}


def architecture(graph: Graph) -> str:
    """llama.cpp's name of the architecture."""
    return ARCHITECTURES[graph.config.family]


def _block_tensors(graph: Graph, layer: int) -> Iterator[GgufTensor]:
    source, target = f"blocks.{layer}.", f"blk.{layer}."

    def stack(name: str, *parts: str, head_dim: int | None = None) -> GgufTensor:
        return _stack(target + name, graph, *(source + part for part in parts), head_dim=head_dim)

    fused = architecture(graph) == "phi3"
    qkv = ("attn_q", "attn_k", "attn_v")
    yield stack("attn_norm", "attn_norm")
    if not fused:
        yield from (stack(name, name, head_dim=graph.config.head_dim) for name in qkv[:2])
        yield stack("attn_v", "attn_v")
    elif len({_type(graph.weights[source + name]) for name in qkv}) == 1:
        yield stack("attn_qkv", *qkv)
    else:  # llama.cpp's phi3 takes them apart too, so each keeps its own type
        yield from (stack(name, name) for name in qkv)
    yield stack("attn_output", "attn_output")
    yield stack("ffn_norm", "mlp_norm")
    if fused:
        yield stack("ffn_up", "mlp_gate", "mlp_up")
    else:
        yield stack("ffn_gate", "mlp_gate")
        yield stack("ffn_up", "mlp_up")
    yield stack("ffn_down", "mlp_down")


def _rope_tensors(graph: Graph) -> Iterator[GgufTensor]:
    """What each frequency is divided by, f32[rope dimensions / 2]."""
    rope = graph.config.rope
    if rope.kind is RopeKind.LONGROPE:
        # llama.cpp takes the long ones if it allocates more than the original context, the short ones if less
        # (llama_model::get_rope_factors). What users let it allocate is not to change the model.
        for name in ("rope_factors_long", "rope_factors_short"):
            yield _constant(name, frequency_divisors(rope))
    elif rope.kind is RopeKind.LLAMA3:
        yield _constant("rope_freqs", frequency_divisors(rope))


def _constant(name: str, numbers: F32) -> GgufTensor:
    return GgufTensor(name + ".weight", GGMLQuantizationType.F32, numbers.shape, constant=numbers)


def _stack(name: str, graph: Graph, *parts: str, head_dim: int | None = None) -> GgufTensor:
    weights = tuple(graph.weights[part] for part in parts)
    types = {_type(weight) for weight in weights}
    if len(types) > 1:
        raise UsageError(
            "one GGUF tensor cannot hold weights of different schemes",
            where=f"{name}.weight",
            expected="one scheme for " + " and ".join(weight.name for weight in weights),
            found=", ".join(weight.scheme.name for weight in weights),
            mend="Give their roles the same scheme in the recipe.",
        )
    rows = sum(weight.shape[0] for weight in weights)
    return GgufTensor(name + ".weight", types.pop(), (rows, *weights[0].shape[1:]), weights, head_dim=head_dim)


def _type(weight: Weight) -> GGMLQuantizationType:
    kind = ggml_type(weight.scheme)
    quantized = weight.scheme.is_quantized
    if kind is None or (quantized and (len(weight.shape) != 2 or weight.shape[1] % GGML_QUANT_SIZES[kind][0])):
        raise UsageError(
            "GGUF has no type for a weight's scheme",
            where=weight.name,
            expected="a float scheme, int8 or int4 symmetric, int4 asymmetric or a GGML type; whole blocks",
            found=f"{weight.scheme.name}, shape {list(weight.shape)}",
            mend="Choose another scheme for this role in the recipe.",
        )
    return kind


def parameter_count(graph: Graph) -> int:
    """The number of weights, a tied matrix counted once."""
    return sum(math.prod(weight.shape) for weight in graph.weights.values())
