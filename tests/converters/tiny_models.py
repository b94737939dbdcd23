"""Tiny random models of every supported family and variant, written by transformers' own save_pretrained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, MistralConfig, Phi3Config, PretrainedConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ORIGINAL_CONTEXT = 32


def longrope(pairs: int) -> dict[str, object]:
    """Rope settings with factors that grow as those of Phi-3.5 do."""
    short = [1.0 + 0.05 * i for i in range(pairs)]
    return {"type": "longrope", "short_factor": short, "long_factor": [1.1 + 2.5 * i for i in range(pairs)]}


@dataclass(frozen=True)
class Variant:
    """A model to make: config class and settings, how it is stored, and the lengths worth comparing."""

    config_class: type[PretrainedConfig]
    settings: dict[str, Any]
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "5GB"
    lengths: tuple[int, ...] = (1, 40)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
}
BOTH_SIDES = (20, ORIGINAL_CONTEXT, ORIGINAL_CONTEXT + 1, 90)
LONG = {"max_position_embeddings": 128, "original_max_position_embeddings": ORIGINAL_CONTEXT}

VARIANTS: dict[str, Variant] = {
    "phi3_mini_4k": Variant(Phi3Config, {"max_position_embeddings": 64, "sliding_window": 63}, lengths=(1, 64)),
    "phi3_mini_128k": Variant(Phi3Config, LONG | {"rope_scaling": longrope(8)}, lengths=BOTH_SIDES),
    "phi3_medium_gqa": Variant(
        Phi3Config, LONG | {"rope_scaling": longrope(8), "num_key_value_heads": 2}, torch.bfloat16, lengths=BOTH_SIDES
    ),
    "phi4": Variant(Phi3Config, {"num_key_value_heads": 1, "rope_theta": 250000.0}, torch.float16, "60KB"),
    "phi4_mini": Variant(
        Phi3Config,
        LONG
        | {
            "rope_scaling": longrope(6),
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
            "num_key_value_heads": 2,
            "sliding_window": 262144,
        },
        torch.bfloat16,
        "60KB",
        BOTH_SIDES,
    ),
    "phi3_window": Variant(Phi3Config, {"sliding_window": 7}, lengths=(6, 7, 8, 50)),
    "phi3_longrope_unextended": Variant(
        Phi3Config,
        {"max_position_embeddings": 32, "original_max_position_embeddings": 32, "rope_scaling": longrope(8)},
        lengths=(32,),
    ),
    "llama2": Variant(LlamaConfig, {"max_position_embeddings": 64}, torch.float16),
    "llama3": Variant(LlamaConfig, {"num_key_value_heads": 2, "rope_theta": 500000.0}, torch.bfloat16, "60KB"),
    "llama3_1": Variant(
        LlamaConfig,
        {"num_key_value_heads": 2, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "max_position_embeddings": 256},
        lengths=(8, 90),
    ),
    "llama3_2": Variant(
        LlamaConfig,
        {
            "num_key_value_heads": 1,
            "rope_theta": 500.0,
            "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
            "tie_word_embeddings": True,
            "head_dim": 32,
        },
        torch.bfloat16,
        lengths=(8, 90),
    ),
    "llama_linear": Variant(LlamaConfig, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "mistral": Variant(
        MistralConfig, {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": 9}, lengths=(8, 9, 10, 50)
    ),
    "mistral_no_window": Variant(MistralConfig, {"num_key_value_heads": 4, "sliding_window": None}, torch.bfloat16),
    "smollm2": Variant(
        LlamaConfig,
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_theta": 100000.0,
            "rope_interleaved": False,
            "is_llama_config": True,
        },
        torch.bfloat16,
    ),
}


def make_checkpoint(name: str, folder: Path) -> Path:
    """Write the variant of that name to `folder`, as its publisher would."""
    variant = VARIANTS[name]
    torch.manual_seed(sorted(VARIANTS).index(name))
    config = variant.config_class(**(SIZES | variant.settings))
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.to(variant.dtype).save_pretrained(folder, max_shard_size=variant.max_shard_size)
    return folder


def randomize(model: PreTrainedModel) -> None:
    """Weights as large as trained ones: the initial ones make attention so uniform that it proves nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)


def reference_logits(folder: Path, token_ids: torch.Tensor) -> torch.Tensor:
    """f32[batch, length, vocab] by transformers, float32, eager attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        logits: torch.Tensor = model(token_ids, use_cache=False).logits
    return logits
