"""A tiny random checkpoint with a complete tokenizer, and recipes for it: builds in seconds, through every runtime."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from transformers import Phi3Config

from tests.converters.tiny_models import longrope, randomize
from tests.converters.tiny_tokenizers import LLAMA3, write_byte_level
from tundish.watcher import Watcher

QUIET = Watcher(lambda text: None, lambda text, total: None, lambda amount: None)
INT4 = {"default": "int4_g32", "overrides": {"embedding": "int8_g32", "lm_head": "int8_g32"}}
ORIGINAL_CONTEXT = 256  # llama.cpp allocates no smaller one
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_phi3(folder: Path) -> Path:
    """Phi-3 with grouped heads and LongRoPE (256 tokens stretched to 512), bf16, two shards."""
    tokenizer = write_byte_level(folder, LLAMA3, chat_template=CHATML)
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        original_max_position_embeddings=ORIGINAL_CONTEXT,
        rope_parameters=longrope(8),
        bos_token_id=None,
        eos_token_id=list(tokenizer.eos_token_ids),
        pad_token_id=tokenizer.eos_token_ids[0],
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="200KB")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


def write_recipe(path: Path, source: Path, **changes: object) -> Path:
    """A recipe for the tiny model, fp32 at its full context in all four containers; `changes` replace top-level keys.

    A random model does not stop, so that gate is off.
    """
    recipe: dict[str, object] = {
        "description": "a test",
        "device": "any",
        "model": {"source": str(source)},
        "context": "full",
        "schemes": {"default": "fp32"},
        "targets": {"gguf": {}, "onnx": {"activations": "fp32"}, "openvino": {}, "mlx": {"activations": "fp32"}},
        "verify": {
            "text": {"sequences": 1, "length": 64},
            "time_limit": 240,
            "answer": {"prompt": "Hello", "max_tokens": 4},
            "gates": {"kl": 1e-5, "top1": 0.98, "stops": False},
        },
    }
    path.write_text(json.dumps(recipe | changes))  # JSON is YAML
    return path
