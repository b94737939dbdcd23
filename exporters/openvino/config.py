"""config.json and generation_config.json in transformers' spelling, for openvino-genai and optimum-intel."""

from __future__ import annotations

import json
import math

from converters.config import ModelConfig, Rope, RopeKind
from exporters.base import Model

ARCHITECTURES = {"phi3": "Phi3ForCausalLM", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

Json = dict[str, object]


def config_json(model: Model) -> bytes:
    """Describes the network that the IR computes. The runtimes take sizes and ids from it, never the arithmetic."""
    config = model.graph.config
    # LongRoPE's attention factor follows from the model's own maximum, whatever the recipe's context is.
    positions = config.context_length if config.rope.kind is RopeKind.LONGROPE else model.context_length
    value: Json = {
        "architectures": [ARCHITECTURES[config.family]],
        "attention_bias": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _eos_token_id(config),
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": positions,
        "model_type": config.family,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": _rope_scaling(config.rope),
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
    }
    if config.head_dim * config.num_heads != config.hidden_size:
        value["head_dim"] = config.head_dim
    if config.family in ("phi3", "mistral"):
        value["sliding_window"] = config.sliding_window
    if config.family == "phi3":
        value["original_max_position_embeddings"] = config.rope.original_context or positions
        value["partial_rotary_factor"] = _partial_rotary_factor(config.rope.dim, config.head_dim)
    return _encode(value)


def generation_json(model: Model) -> bytes:
    """The special ids, of which openvino-genai stops at each EOS, and the publisher's sampling defaults."""
    config = model.graph.config
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _eos_token_id(config),
        "pad_token_id": config.pad_token_id,
    }
    return _encode({key: value for key, value in ids.items() if value is not None} | dict(model.sampling))


def _eos_token_id(config: ModelConfig) -> int | list[int] | None:
    ids = config.eos_token_ids
    return list(ids) if len(ids) > 1 else ids[0] if ids else None


def _rope_scaling(rope: Rope) -> Json | None:
    if rope.kind is RopeKind.DEFAULT:
        return None
    if rope.kind is RopeKind.LONGROPE:
        return {
            "type": "longrope",
            "short_factor": list(rope.short_factors),
            "long_factor": list(rope.long_factors),
        }
    value: Json = {"rope_type": rope.kind.value, "factor": rope.factor}
    if rope.kind is RopeKind.LLAMA3:
        value |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_context,
        }
    return value


def _partial_rotary_factor(dim: int, head_dim: int) -> float:
    """A factor that transformers' int(head_dim * factor) turns into exactly `dim`."""
    factor = dim / head_dim
    return factor if int(head_dim * factor) == dim else math.nextafter(factor, math.inf)


def _encode(value: Json) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
