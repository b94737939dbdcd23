"""Files in transformers' spelling, for the runtimes that read those: configuration, special ids, tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from converters.config import Rope
from converters.config_keys import FAMILIES
from exporters.base import Model

Json = dict[str, object]

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def decoder_config(model: Model, positions: int, rope_scaling: Json | None, dtype: str) -> Json:
    """The keys of config.json that every family has."""
    config = model.graph.config
    return {
        "architectures": [FAMILIES[config.family].causal_lm],
        "attention_bias": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos_token_id(model),
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
        "rope_scaling": rope_scaling,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
    }


def generation_config(model: Model) -> Json:
    """generation_config.json: the special ids, at each EOS of which runtimes stop, and the publisher's sampling."""
    config = model.graph.config
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos_token_id(model),
        "pad_token_id": config.pad_token_id,
    }
    return {key: value for key, value in ids.items() if value is not None} | dict(model.sampling)


def eos_token_id(model: Model) -> int | list[int]:
    """One id, or all of them: in the order in which the model states them, the tokenizer's own where it states none."""
    ids = model.graph.config.eos_token_ids or model.tokenizer.eos_ids
    return list(ids) if len(ids) > 1 else ids[0]


def llama3_scaling(rope: Rope) -> Json:
    """rope_scaling of Llama 3.1 and later."""
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_context,
    }


def partial_rotary_factor(dim: int, head_dim: int) -> float:
    """A factor that int(head_dim * factor), which transformers and mlx-lm compute, turns into exactly `dim`."""
    factor = dim / head_dim
    return factor if int(head_dim * factor) == dim else math.nextafter(factor, math.inf)


def tokenizer_files(model: Model) -> dict[str, bytes]:
    """The checkpoint's tokenizer files as they are; the chat template as a file where none of them holds it."""
    files = {name: path.read_bytes() for name, path in model.tokenizer.files.items()}
    template = model.tokenizer.chat_template
    if template is not None and TEMPLATE not in files:
        files[TEMPLATE] = template.encode()
    return files


def with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """The files with this chat template and no other: some runtimes prefer tokenizer_config.json's to the file's."""
    changed = {**files, TEMPLATE: template.encode()}
    settings = json.loads(files.get(CONFIG, b"{}"))
    if settings.get("chat_template", template) != template:
        changed[CONFIG] = encode_json({key: value for key, value in settings.items() if key != "chat_template"})
    return changed


def encode_json(value: Json) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
