"""config.json in transformers' spelling, for openvino-genai and optimum-intel."""

from __future__ import annotations

from converters.config import Rope, RopeKind
from exporters.base import Model
from exporters.transformers_files import Json, decoder_config, encode_json, llama3_scaling, partial_rotary_factor


def config_json(model: Model) -> bytes:
    """Describes the network that the IR computes. The runtimes take sizes and ids from it, never the arithmetic."""
    config = model.graph.config
    # LongRoPE's attention factor follows from the model's own maximum, whatever the recipe's context is.
    positions = config.context_length if config.rope.kind is RopeKind.LONGROPE else model.context_length
    value = decoder_config(model, positions, _rope_scaling(config.rope), "float32")
    if config.head_dim * config.num_heads != config.hidden_size:
        value["head_dim"] = config.head_dim
    if config.family in ("phi3", "mistral"):
        value["sliding_window"] = config.sliding_window
    if config.family == "phi3":
        value["original_max_position_embeddings"] = config.rope.original_context or positions
        value["partial_rotary_factor"] = partial_rotary_factor(config.rope.dim, config.head_dim)
    return encode_json(value)


def _rope_scaling(rope: Rope) -> Json | None:
    if rope.kind is RopeKind.DEFAULT:
        return None
    if rope.kind is RopeKind.LONGROPE:
        return {
            "type": "longrope",
            "short_factor": list(rope.short_factors),
            "long_factor": list(rope.long_factors),
        }
    if rope.kind is RopeKind.LLAMA3:
        return llama3_scaling(rope)
    return {"rope_type": rope.kind.value, "factor": rope.factor}
