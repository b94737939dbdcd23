"""Which keys of config.json tundish knows, and what it makes of them.

Four kinds: keys that are read; keys that change nothing in what the model computes and are ignored; keys that would
change it and are accepted only with the neutral value; and keys nobody has looked at, which are an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from converters.errors import ModelError
from converters.json_file import Json


@dataclass(frozen=True, slots=True)
class Family:
    """What is particular to a model_type. `defaults` are those of its config class in transformers."""

    causal_lm: str
    rope_types: tuple[str, ...]
    defaults: Mapping[str, Json]
    partial_rotary: bool = False
    neutral: Mapping[str, tuple[Json, ...]] = field(default_factory=dict)


_COMMON_DEFAULTS: dict[str, Json] = {
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
}

FAMILIES: dict[str, Family] = {
    "phi3": Family(
        "Phi3ForCausalLM",
        ("default", "longrope"),
        _COMMON_DEFAULTS | {"rms_norm_eps": 1e-5, "eos_token_id": 32000, "original_max_position_embeddings": 4096},
        partial_rotary=True,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        ("default", "linear", "llama3"),
        _COMMON_DEFAULTS | {"rms_norm_eps": 1e-6, "eos_token_id": 2},
        neutral={"sliding_window": ()},  # transformers' Llama code has no window and would not look at the key
    ),
    "mistral": Family(
        "MistralForCausalLM",
        ("default", "linear", "llama3"),
        _COMMON_DEFAULTS | {"rms_norm_eps": 1e-6, "eos_token_id": 2, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


READ = _names(
    """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim rms_norm_eps max_position_embeddings sliding_window use_sliding_window layer_types tie_word_embeddings
    bos_token_id eos_token_id pad_token_id rope_theta rope_scaling rope_parameters partial_rotary_factor
    original_max_position_embeddings architectures
    """
)

# Rope settings that the older spelling keeps outside of rope_scaling.
ROPE_KEYS_OUTSIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
ROPE_ALIASES = {"su": "longrope"}  # the name in Phi-3's first release
_ROPE_COMMON = frozenset({"rope_type", *ROPE_KEYS_OUTSIDE})
ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": _ROPE_COMMON,
    "linear": _ROPE_COMMON | {"factor"},
    "llama3": _ROPE_COMMON | {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": _ROPE_COMMON | {"factor", "attention_factor", "short_factor", "long_factor"},
}

# Training, bookkeeping, generation defaults of old, and the fields every config of transformers carries.
IGNORED = _names(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path
    attention_dropout attn_implementation auto_map bad_words_ids base_model_pp_plan base_model_tp_plan
    begin_suppress_tokens chunk_size_feed_forward classifier_dropout decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout
    hidden_dropout_prob id2label initializer_range is_decoder is_llama_config keys_to_ignore_at_inference label2id
    length_penalty max_length max_sequence_length min_length name_or_path no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p
    torch_dtype torchscript transformers.js_config transformers_version transformers_weights typical_p unk_token_id
    unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict
    """
)

# Keys that change the arithmetic, with the values that do not. Null is neutral for all of them.
NEUTRAL: dict[str, tuple[Json, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "audio_config": (),
    "bias": (False,),
    "compression_config": (),
    "cross_attention_hidden_size": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_encoder_decoder": (False,),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "num_experts": (0,),
    "num_experts_per_tok": (0,),
    "num_local_experts": (0,),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "quantization": (),
    "quantization_config": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "scale_emb": (1,),
    "text_config": (),
    "tie_encoder_decoder": (False,),
    "use_qk_norm": (False,),
    "vision_config": (),
}

_MENDS = {
    "quantization_config": "The checkpoint is already quantized: convert the original, unquantized one.",
    "quantization": "The checkpoint is already quantized: convert the original, unquantized one.",
    "compression_config": "The checkpoint is already quantized: convert the original, unquantized one.",
    "vision_config": "Models with images are not supported: convert a text-only model.",
    "audio_config": "Models with sound are not supported: convert a text-only model.",
    "text_config": "Multi-modal models are not supported: convert a text-only model.",
}
_OTHER_ARITHMETIC = "tundish would compute something else than this model: it needs support for this first."


def check_keys(family: Family, raw: Mapping[str, Json], where: str) -> None:
    """ModelError names the first key that is unknown, or known to change the arithmetic and not neutral."""
    architectures = raw.get("architectures")
    if isinstance(architectures, list) and architectures and family.causal_lm not in architectures:
        raise ModelError(
            "not a causal language model of its family",
            where=f"{where}, key architectures",
            expected=family.causal_lm,
            found=", ".join(map(str, architectures)),
            mend="Convert a checkpoint that has a language model head.",
        )
    neutral = NEUTRAL | dict(family.neutral)
    for key, value in raw.items():
        if value is None or (key in READ | IGNORED and key not in neutral):
            continue
        if key not in neutral:
            raise ModelError(
                "unknown key, which may change what the model computes",
                where=f"{where}, key {key}",
                found=shown(value),
                mend="If it is only a note, remove it from the file; if not, tundish needs support for it first.",
            )
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral[key]):
            raise ModelError(
                "this model computes something that tundish does not support",
                where=f"{where}, key {key}",
                expected=" or ".join(shown(each) for each in neutral[key]) or "null, or no such key",
                found=shown(value),
                mend=_MENDS.get(key, _OTHER_ARITHMETIC),
            )


def check_rope_keys(kind: str, raw: Mapping[str, Json], where: str) -> None:
    """ModelError names a rope setting that this kind does not have."""
    unknown = sorted(set(raw) - ROPE_KEYS[kind])
    if unknown:
        raise ModelError(
            f"unknown rope setting for {kind}",
            where=f"{where}, key {unknown[0]}",
            expected=", ".join(sorted(ROPE_KEYS[kind])),
            found=shown(raw[unknown[0]]),
            mend=_OTHER_ARITHMETIC,
        )


def shown(value: Json) -> str:
    """A value as a message shows it: short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
