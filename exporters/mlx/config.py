"""config.json in the spelling that mlx-lm's models/phi3.py and models/llama.py read (0.29 to 0.32)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from converters.config import ModelConfig, Rope, RopeKind
from converters.errors import UsageError
from exporters.base import Activations, Model, Semantics, Target
from exporters.context import context_sentence
from exporters.schemes import require_family
from exporters.transformers_files import Json, decoder_config, llama3_scaling, partial_rotary_factor

# What initialize_rope and phi3.Attention understand; model_type "mistral" is read with models/llama.py. phi3 takes
# "linear" only together with a dummy long_factor.
ROPE_KINDS = {
    "phi3": (RopeKind.DEFAULT, RopeKind.LONGROPE),
    "llama": (RopeKind.DEFAULT, RopeKind.LINEAR, RopeKind.LLAMA3),
    "mistral": (RopeKind.DEFAULT, RopeKind.LINEAR, RopeKind.LLAMA3),
}

TORCH_DTYPES = {Activations.FP32: "float32", Activations.FP16: "float16", Activations.BF16: "bfloat16"}


def check_config(model: Model) -> None:
    """UsageError if mlx-lm has no model that computes this one within the context asked for."""
    config, rope = model.graph.config, model.graph.config.rope
    require_family(model, Target.MLX, ROPE_KINDS)
    if rope.kind not in ROPE_KINDS[config.family]:
        expected = ", ".join(kind.value for kind in ROPE_KINDS[config.family])
        raise _unsupported(f"RoPE scaling of a {config.family} model", expected, rope.kind.value)
    if config.family == "phi3" and config.head_dim * config.num_heads != config.hidden_size:
        raise _unsupported(
            "head size of a phi3 model", f"{config.hidden_size // config.num_heads}", f"{config.head_dim}"
        )
    if config.family != "phi3" and rope.dim != config.head_dim:
        raise _unsupported(f"partial rotary embedding of a {config.family} model", f"{config.head_dim}", f"{rope.dim}")
    window = config.sliding_window
    if window is not None and model.context_length > window:
        raise UsageError(
            "mlx-lm ignores the sliding window of this model",
            where="target mlx",
            expected=f"a context of at most the window, {window} tokens",
            found=f"{model.context_length}",
            mend=f"Set context to {window} or less, or leave the target mlx out.",
        )
    if rope.kind is RopeKind.LONGROPE:
        _check_attention_factor(rope)


def _check_attention_factor(rope: Rope) -> None:
    # Beyond 4 the length that stands for the factor would be astronomical; published models have less than 1.3.
    within = 1 <= rope.attention_factor <= 4
    if not within or not math.isclose(_su_scale(rope), rope.attention_factor, rel_tol=1e-6):
        raise _unsupported("LongRoPE attention factor", "one between 1 and 4", f"{rope.attention_factor}")


def _unsupported(what: str, expected: str, found: str) -> UsageError:
    return UsageError(
        f"mlx-lm does not support this {what}",
        where="target mlx",
        expected=expected,
        found=found,
        mend="Leave the target mlx out for this model.",
    )


def model_config(model: Model, activations: Activations, quantization: Mapping[str, object] | None) -> Json:
    """The whole config.json. `quantization` as mlx-lm reads it, None where no matrix is quantized."""
    config = model.graph.config
    json = decoder_config(model, model.context_length, None, TORCH_DTYPES[activations])
    json |= _phi3_rope(model) if config.family == "phi3" else _llama_rope(config)
    if quantization is not None:
        json |= {"quantization": quantization, "quantization_config": quantization}
    return json


def semantics(model: Model) -> Semantics:
    """How mlx-lm treats the positions of this artifact."""
    return Semantics(f"{context_sentence(model)}; mlx-lm does not enforce the limit.", model.context_length)


def _phi3_rope(model: Model) -> Json:
    config, rope = model.graph.config, model.graph.config.rope
    json: Json = {"partial_rotary_factor": partial_rotary_factor(rope.dim, config.head_dim)}
    if rope.kind is not RopeKind.LONGROPE:
        return json
    # mlx-lm 0.30 and later rotate by the long factors at every length, 0.29 chooses by the length so far. The attention
    # factor has no key of its own: it follows from the two lengths.
    factors = list(rope.factors)
    return json | {
        "max_position_embeddings": _su_max_positions(rope),
        "original_max_position_embeddings": rope.original_context,
        "rope_scaling": {"type": "longrope", "short_factor": factors, "long_factor": factors},
    }


def _llama_rope(config: ModelConfig) -> Json:
    rope = config.rope
    json: Json = {"head_dim": config.head_dim, "mlp_bias": False}
    if rope.kind is RopeKind.LINEAR:
        json["rope_scaling"] = {"rope_type": "linear", "type": "linear", "factor": rope.factor}
    if rope.kind is RopeKind.LLAMA3:
        json["rope_scaling"] = llama3_scaling(rope)
    return json


def _su_max_positions(rope: Rope) -> int:
    """max_position_embeddings from which SuScaledRoPE derives the model's attention factor.

    SuScaledRoPE scales by sqrt(1 + ln(max / original) / ln(original)), so max = original ** (factor ** 2): the model's
    own value where it uses this formula, and the nearest whole number where config.json states another factor.
    """
    return round(math.pow(rope.original_context, rope.attention_factor**2))


def _su_scale(rope: Rope) -> float:
    """The scale that SuScaledRoPE computes from what config.json states; 1 up to the original context."""
    ratio = _su_max_positions(rope) / rope.original_context
    return 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(rope.original_context))
