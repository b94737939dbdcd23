"""Which keys of config.json tundish knows, and what it makes of them.

Five kinds: keys that are read; keys that change nothing in what the model computes and are ignored; keys that would
change it and are accepted only with the neutral value; keys that transformers' config class of the family declares and
nobody has looked at, which are an error; and keys that it does not declare, so that its models do not read them either:
these are ignored and named in a note.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from converters.declared_keys import DECLARED
from converters.errors import ModelError
from converters.json_file import Json


@dataclass(frozen=True, slots=True)
class Family:
    """What is particular to a model_type. `defaults` and `declared` keys are those of its config class in transformers;
    `rope_aliases` are names that this class takes for others."""

    causal_lm: str
    declared: frozenset[str]
    rope_types: tuple[str, ...]
    defaults: Mapping[str, Json]
    partial_rotary: bool = False
    neutral: Mapping[str, tuple[Json, ...]] = field(default_factory=dict)
    rope_aliases: Mapping[str, str] = field(default_factory=dict)


_COMMON_DEFAULTS: dict[str, Json] = {
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
}

FAMILIES: dict[str, Family] = {
    "phi3": Family(
        "Phi3ForCausalLM",
        DECLARED["phi3"],
        ("default", "longrope"),
        _COMMON_DEFAULTS | {"rms_norm_eps": 1e-5, "eos_token_id": 32000, "original_max_position_embeddings": 4096},
        partial_rotary=True,
        rope_aliases={"su": "longrope", "yarn": "longrope"},  # names in early releases of Phi-3
    ),
    "llama": Family(
        "LlamaForCausalLM",
        DECLARED["llama"],
        ("default", "linear", "llama3"),
        _COMMON_DEFAULTS | {"rms_norm_eps": 1e-6, "eos_token_id": 2},
        neutral={"sliding_window": ()},  # transformers' Llama code has no window and would not look at the key
    ),
    "mistral": Family(
        "MistralForCausalLM",
        DECLARED["mistral"],
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
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _name_or_path allow_global_per_layer_attribute_access attention_dropout
    attn_implementation auto_map bad_words_ids base_model_pp_plan base_model_tp_plan begin_suppress_tokens
    chunk_size_feed_forward classifier_dropout decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    embd_pdrop encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout hidden_dropout_prob id2label initializer_range
    is_decoder is_llama_config keys_to_ignore_at_inference label2id length_penalty max_length max_sequence_length
    min_length name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores prefix pretraining_tp problem_type remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id
    serialize_explicit_per_layer_config suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p
    unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict
    """
)

# Keys that change the arithmetic, with the values that do not. Null is neutral for all of them. Some are of other
# families; transformers reads is_causal, attention_chunk_size and kv_sharing_modes of any.
NEUTRAL: dict[str, tuple[Json, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "audio_config": (),
    "bias": (False,),
    "cross_attention_hidden_size": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_sharing_modes": (),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "num_experts": (0,),
    "num_experts_per_tok": (0,),
    "num_local_experts": (0,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "scale_emb": (1,),
    "text_config": (),
    "tie_encoder_decoder": (False,),
    "transformers_weights": ("model.safetensors", "model.safetensors.index.json"),
    "use_qk_norm": (False,),
    "vision_config": (),
}

_MENDS = {
    "vision_config": "Models with images are not supported: convert a text-only model.",
    "audio_config": "Models with sound are not supported: convert a text-only model.",
    "text_config": "Multi-modal models are not supported: convert a text-only model.",
}
_OTHER_ARITHMETIC = "tundish would compute something else than this model: it needs support for this first."


def refusals(family: Family, raw: Mapping[str, Json], where: str) -> list[ModelError]:
    """An error for each key that is declared and unknown, or known to change the arithmetic and not neutral."""
    found = []
    architectures = raw.get("architectures")
    if isinstance(architectures, list) and architectures and family.causal_lm not in architectures:
        found.append(
            ModelError(
                "not a causal language model of its family",
                where=f"{where}, key architectures",
                expected=family.causal_lm,
                found=", ".join(map(str, architectures)),
                mend="Convert a checkpoint that has a language model head.",
            )
        )
    neutral = _neutral(family)
    for key, value in raw.items():
        if value is None or (key == "sliding_window" and raw.get("use_sliding_window") is False):
            continue
        if key in neutral:
            if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral[key]):
                found.append(_not_neutral(key, value, neutral[key], where))
        elif key in family.declared - READ - IGNORED:
            found.append(
                ModelError(
                    "unknown key, which may change what the model computes",
                    where=f"{where}, key {key}",
                    found=shown(value),
                    mend="tundish needs support for it first.",
                )
            )
    return found


def unread_keys(family: Family, raw: Mapping[str, Json]) -> list[str]:
    """Keys that neither tundish nor transformers' class of the family reads."""
    return sorted(set(raw) - READ - IGNORED - set(_neutral(family)) - family.declared)


def _neutral(family: Family) -> dict[str, tuple[Json, ...]]:
    return NEUTRAL | dict(family.neutral)


def _not_neutral(key: str, value: Json, neutral: tuple[Json, ...], where: str) -> ModelError:
    return ModelError(
        "this model computes something that tundish does not support",
        where=f"{where}, key {key}",
        expected=" or ".join(shown(each) for each in neutral) or "null, or no such key",
        found=shown(value),
        mend=_MENDS.get(key, _OTHER_ARITHMETIC),
    )


def raise_all(errors: Sequence[ModelError]) -> None:
    """The error, if there is one; one that tells of all, if there are several."""
    if not errors:
        return
    if len(errors) == 1:
        raise errors[0]
    raise ModelError(
        f"{len(errors)} settings of this model are not supported",
        found="; ".join(
            f"{error.where}: {error.found}" + (f" (expected {error.expected})" if error.expected else "")
            for error in errors
        ),
        mend=" ".join(dict.fromkeys(error.mend for error in errors if error.mend)),
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


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names as a message shows them: the first ones."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def shown(value: Json) -> str:
    """A value as a message shows it: short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
