"""The key-value section of a GGUF file, but for the tokenizer's keys.

Keys and types are those of the GGUF specification (ggml/docs/gguf.md) and of gguf-py's constants.py; the choice of keys
follows what llama.cpp reads for the architectures phi3 and llama.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, LlamaFileType, size_label

from converters.config import ModelConfig, RopeKind
from exporters.base import Model
from exporters.gguf.entry import Entry, f32, i32, string, u32
from exporters.gguf.tensors import GgufTensor, architecture, parameter_count
from exporters.gguf.vocab import safe_general_name

FILE_TYPES: dict[GGMLQuantizationType, LlamaFileType] = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GGMLQuantizationType.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    GGMLQuantizationType.IQ4_NL: LlamaFileType.MOSTLY_IQ4_NL,
    GGMLQuantizationType.IQ4_XS: LlamaFileType.MOSTLY_IQ4_XS,
    GGMLQuantizationType.Q2_K: LlamaFileType.MOSTLY_Q2_K,
    GGMLQuantizationType.Q3_K: LlamaFileType.MOSTLY_Q3_K_S,
    GGMLQuantizationType.Q4_K: LlamaFileType.MOSTLY_Q4_K_S,
    GGMLQuantizationType.Q5_K: LlamaFileType.MOSTLY_Q5_K_S,
    GGMLQuantizationType.Q6_K: LlamaFileType.MOSTLY_Q6_K,
}


def metadata(model: Model, tensors: Sequence[GgufTensor]) -> list[Entry]:
    """Everything but tokenizer.*: what the model is, its sizes, its rotary embedding."""
    arch = architecture(model.graph)
    return [
        *_general(model, arch, tensors),
        *(Entry(f"{arch}.{entry.key}", entry.value, entry.type, entry.item) for entry in _sizes(model)),
    ]


def _general(model: Model, arch: str, tensors: Sequence[GgufTensor]) -> Iterator[Entry]:
    count = parameter_count(model.graph)
    yield string("general.architecture", arch)
    yield string("general.type", "model")
    yield string("general.name", safe_general_name(model.name, model.tokenizer))
    yield string("general.size_label", size_label(count, count, 0, 0))
    if model.licence:
        yield string("general.license", model.licence)
    yield u32("general.file_type", _file_type(model, tensors))
    yield u32("general.quantization_version", GGML_QUANT_VERSION)
    yield from _sampling(model)


def _file_type(model: Model, tensors: Sequence[GgufTensor]) -> LlamaFileType:
    """The mix by its name, whatever its fallbacks left of it, as llama-quantize does; else what prevails."""
    if model.mix is not None:
        return LlamaFileType[f"MOSTLY_{model.mix.upper()}"]
    return FILE_TYPES[_prevailing_type(tensors)]


def _prevailing_type(tensors: Sequence[GgufTensor]) -> GGMLQuantizationType:
    """The type that holds most numbers: general.file_type is meant that way ("mostly")."""
    numbers: dict[GGMLQuantizationType, int] = {}
    for tensor in tensors:
        numbers[tensor.type] = numbers.get(tensor.type, 0) + math.prod(tensor.shape)
    return max(numbers, key=lambda kind: (numbers[kind], kind))


def _sampling(model: Model) -> Iterator[Entry]:
    """The publisher's sampling defaults, where llama.cpp's programs start; none for a model published as greedy."""
    if model.sampling.get("do_sample") is False:
        return
    if "top_k" in model.sampling:
        yield i32("general.sampling.top_k", int(model.sampling["top_k"]))
    if "top_p" in model.sampling:
        yield f32("general.sampling.top_p", float(model.sampling["top_p"]))
    if "temperature" in model.sampling:
        yield f32("general.sampling.temp", float(model.sampling["temperature"]))


def _sizes(model: Model) -> Iterator[Entry]:
    config = model.graph.config
    yield u32("vocab_size", config.vocab_size)
    yield u32("context_length", model.context_length)
    yield u32("embedding_length", config.hidden_size)
    yield u32("block_count", config.num_layers)
    yield u32("feed_forward_length", config.intermediate_size)
    yield u32("attention.head_count", config.num_heads)
    yield u32("attention.head_count_kv", config.num_kv_heads)
    yield u32("attention.key_length", config.head_dim)
    yield u32("attention.value_length", config.head_dim)
    yield f32("attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    if config.family == "phi3":
        # Zero tells llama.cpp that a phi3 model has no window; without the key old versions assume Phi-3-mini's.
        yield u32("attention.sliding_window", config.sliding_window or 0)
    yield from _rope(config)


def _rope(config: ModelConfig) -> Iterator[Entry]:
    rope = config.rope
    yield u32("rope.dimension_count", rope.dim)
    yield f32("rope.freq_base", rope.theta)
    if rope.kind is RopeKind.LINEAR:
        yield string("rope.scaling.type", "linear")
        yield f32("rope.scaling.factor", rope.factor)
    elif rope.kind is RopeKind.LONGROPE:
        yield string("rope.scaling.type", "longrope")
        yield u32("rope.scaling.original_context_length", rope.original_context)
        yield f32("rope.scaling.attn_factor", rope.attention_factor)
