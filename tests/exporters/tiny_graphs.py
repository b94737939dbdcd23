"""Tiny random models that need neither a checkpoint nor a tokenizer on disk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from converters.architectures import llama, phi3
from converters.config import ModelConfig, Rope, RopeKind
from converters.graph import Graph
from converters.passes.context import for_context
from converters.tensors import TensorTable
from converters.tokenizer import SpacePrefix, Token, Tokenizer, TokenizerKind, TokenType
from exporters.base import Model
from tests.converters.arrays import ArraySource

VOCAB = 320
HEAD_DIM = 16

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


def longrope(original: int, dim: int) -> Rope:
    """LongRoPE past `original` tokens for `dim` rotated dimensions, with factors that grow as those of Phi-3.5 do."""
    pairs = range(dim // 2)
    return Rope(
        RopeKind.LONGROPE,
        10000.0,
        dim,
        original_context=original,
        attention_factor=1.19,
        short_factors=tuple(1 + 0.05 * i for i in pairs),
        long_factors=tuple(1.1 + 2.5 * i for i in pairs),
    )


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
    return for_context(build(config, RandomTensors(seed)), config.context_length)


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


def model_of(graph: Graph, context_length: int | None = None, **changes: object) -> Model:
    context = context_length or graph.config.context_length
    base = Model(for_context(graph, context), byte_tokenizer(), context, "Tiny")
    return replace(base, **changes)  # type: ignore[arg-type]
