"""Tiny random models of every shape that llama.cpp treats differently, and their artifacts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from converters.architectures import llama, phi3
from converters.config import ModelConfig, Rope, RopeKind
from converters.graph import Graph, Node, Weight
from converters.ops import Attention
from converters.quantize.block import dequantize, quantize_rows
from converters.quantize.tensor import F32, FloatArray
from converters.tensors import TensorTable
from converters.tokenizer import SpacePrefix, Token, Tokenizer, TokenizerKind, TokenType
from exporters.base import Layout, Model, Target
from exporters.gguf.exporter import EXPORTER
from tundish.pour import pour

VOCAB = 320
HEAD_DIM = 16
ORIGINAL = 256  # the smallest context that llama.cpp allocates: shorter ones would never see the short factors
PAIRS = 6
LONGROPE = Rope(
    RopeKind.LONGROPE,
    10000.0,
    2 * PAIRS,
    original_context=ORIGINAL,
    attention_factor=1.19,
    short_factors=tuple(1 + 0.05 * i for i in range(PAIRS)),
    long_factors=tuple(1.1 + 2.5 * i for i in range(PAIRS)),
)
LLAMA3 = Rope(RopeKind.LLAMA3, 5000.0, HEAD_DIM, 8.0, 1.0, 4.0, original_context=64)
PLAIN = Rope(RopeKind.DEFAULT, 10000.0, HEAD_DIM)

BASE = ModelConfig(
    family="phi3",
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=HEAD_DIM,
    rms_norm_eps=1e-5,
    rope=PLAIN,
    context_length=1024,
    sliding_window=None,
    tie_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=None,
)
LLAMA = replace(BASE, family="llama", num_kv_heads=2)

CONFIGS: dict[str, ModelConfig] = {
    "phi3": BASE,
    "phi3_longrope": replace(BASE, rope=LONGROPE, context_length=ORIGINAL),
    "phi3_gqa_tied": replace(BASE, rope=replace(PLAIN, dim=12), num_kv_heads=2, tie_embeddings=True),
    "phi3_linear": replace(BASE, rope=replace(PLAIN, kind=RopeKind.LINEAR, factor=4.0)),
    "llama": replace(LLAMA, num_kv_heads=4),
    "llama_gqa_llama3_tied": replace(LLAMA, rope=LLAMA3, tie_embeddings=True),
    "llama_linear": replace(LLAMA, rope=replace(PLAIN, kind=RopeKind.LINEAR, factor=4.0)),
    "mistral_wide_heads": replace(LLAMA, family="mistral", head_dim=32, rope=replace(PLAIN, dim=32)),
}


@dataclass(frozen=True, slots=True, eq=False)
class ArraySource:
    """A tensor in memory."""

    array: F32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[np.float32]:
        return self.array.dtype

    @property
    def location(self) -> tuple[str, int]:
        return "", 0

    def read(self, start: int, stop: int) -> FloatArray:
        return self.array[start:stop]


class RandomTensors(TensorTable):
    """A checkpoint in which every tensor asked for exists, with random numbers as large as trained ones."""

    def __init__(self, seed: int) -> None:
        super().__init__({})
        self._random = np.random.default_rng(seed)

    def take(self, name: str, shape: tuple[int, ...]) -> ArraySource:  # type: ignore[override]  # in memory, not in a file
        if len(shape) == 1:
            return ArraySource(self._random.uniform(0.5, 1.5, shape).astype(np.float32))
        return ArraySource(self._random.normal(0, 1.5 * shape[1] ** -0.5, shape).astype(np.float32))


def random_graph(config: ModelConfig, seed: int = 0) -> Graph:
    build = phi3.build if config.family == "phi3" else llama.build
    return build(config, RandomTensors(seed))


def with_long_factors(graph: Graph) -> Graph:
    """The model if LongRoPE's long factors were used at every length."""

    def change(node: Node) -> Node:
        op = node.op
        if not isinstance(op, Attention) or op.rope is None:
            return node
        return replace(node, op=replace(op, rope=replace(op.rope, short_factors=op.rope.long_factors)))

    return replace(graph, nodes=tuple(change(node) for node in graph.nodes))


def byte_tokenizer() -> Tokenizer:
    """SentencePiece with a token for every byte and no merges."""
    special = [Token("<unk>", TokenType.UNKNOWN), Token("<s>", TokenType.CONTROL), Token("</s>", TokenType.CONTROL)]
    rows = [*special, *(Token(f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256))]
    rows += [Token(f"<unused{index}>", TokenType.UNUSED) for index in range(VOCAB - len(rows))]
    return Tokenizer(
        kind=TokenizerKind.SENTENCEPIECE,
        tokens=tuple(rows),
        merges=(),
        split_patterns=(),
        ignore_merges=False,
        space_prefix=SpacePrefix.NEVER,
        add_bos=True,
        add_eos=False,
        bos_id=1,
        eos_ids=(2,),
        pad_id=None,
        unk_id=0,
        chat_template=None,
        files={},
    )


def model_of(graph: Graph, **changes: object) -> Model:
    base = Model(graph, byte_tokenizer(), graph.config.context_length, "Tiny")
    return replace(base, **changes)  # type: ignore[arg-type]


def layout_of(model: Model) -> Layout:
    EXPORTER.check(model, EXPORTER.options())
    return EXPORTER.layout(model, EXPORTER.options())


def write_artifact(model: Model, folder: Path) -> Path:
    """The folder of the finished artifact."""
    pour(model.graph, {Target.GGUF: layout_of(model)}, folder)
    return folder / Target.GGUF


def stored_values(weight: Weight) -> F32:
    """What an artifact holds of a weight, exactly."""
    return dequantize(quantize_rows(weight, 0, weight.shape[0]))
