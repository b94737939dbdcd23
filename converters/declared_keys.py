"""The keys of config.json that transformers' config classes declare, as of 5.24: fields, and properties with setters.

A table, so that nobody waits for transformers to be imported, or needs it. A test holds it to the installed one. What a
class does not declare, its models do not read, with the few exceptions that `converters.config_keys.NEUTRAL` has.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


BASE = _names(
    """
    _attn_implementation _experts_implementation allow_global_per_layer_attribute_access architectures
    chunk_size_feed_forward dtype id2label is_encoder_decoder label2id name_or_path num_labels output_attentions
    output_hidden_states per_layer_config problem_type return_dict rope_scaling serialize_explicit_per_layer_config
    torch_dtype transformers_version
    """
)

_DECODER = _names(
    """
    attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range intermediate_size
    max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads pad_token_id rms_norm_eps
    rope_parameters tie_word_embeddings use_cache vocab_size
    """
)

DECLARED: dict[str, frozenset[str]] = {
    "phi3": BASE | _DECODER | _names("embd_pdrop original_max_position_embeddings resid_pdrop sliding_window"),
    "llama": BASE | _DECODER | _names("attention_bias head_dim mlp_bias pretraining_tp"),
    "mistral": BASE | _DECODER | _names("head_dim sliding_window"),
}
