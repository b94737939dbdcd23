"""Checkpoints of a named shape with random weights: what a conversion costs depends on shapes, not on what was learned.

    python -m benchmarks.checkpoint phi-3.5-mini build/phi-3.5-mini
    python -m benchmarks.checkpoint phi-4 build/phi-4-a-quarter --layers 10

Weights are normal, standard deviation 0.02, bf16, in safetensors shards as on the Hub. The tokenizer is one of
SentencePiece's with 32,000 tokens and Phi-3's added ones; shapes with more rows leave the rest of them unused.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

SHARD_NBYTES = 5_000_000_000  # where the Hub's checkpoints are cut
POOL_ELEMENTS = (1 << 24) + 3  # odd, so that a matrix's rows are never the same numbers
CHUNK_ELEMENTS = 1 << 22
DEVIATION = 0.02
TOKENS = 32011  # what the tokenizer knows: SentencePiece's 32,000 and Phi-3's eleven


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's sizes: channels, heads, blocks, rows of the vocabulary. `rope` is config.json's part on positions."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    rope: Mapping[str, object]

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for _, shape in tensors(self))


def _long_rope(pairs: int) -> dict[str, object]:
    """LongRoPE of Phi-3.5's kind: short factors near 1, long ones that grow to 65 (the published ones are tuned)."""
    short = [round(1 + 2 * (i / (pairs - 1)) ** 2, 4) for i in range(pairs)]
    long = [round(1.08 * 60 ** (i / (pairs - 1)), 4) for i in range(pairs)]
    return {"type": "longrope", "short_factor": short, "long_factor": long}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# The sizes are those of the published config.json files, but for `small`, on which kernels are compiled beforehand.
SHAPES = {
    "phi-3.5-mini": Shape(
        "phi3", 3072, 8192, 32, 32, 32, 32064, 131072,
        {"rope_theta": 10000.0, "rope_scaling": _long_rope(48), "original_max_position_embeddings": 4096},
    ),
    "phi-4": Shape(
        "phi3", 5120, 17920, 40, 40, 10, 100352, 16384,
        {"rope_theta": 250000.0, "rope_scaling": None, "original_max_position_embeddings": 16384},
    ),
    "llama-70b": Shape(
        "llama", 8192, 28672, 80, 64, 8, 128256, 131072, {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}
    ),
    "small": Shape("phi3", 512, 1024, 1, 8, 8, 32064, 4096, {"rope_theta": 10000.0, "rope_scaling": None}),
}  # fmt: skip


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of a published checkpoint."""
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for block in range(shape.layers):
        for name, size in _block(shape):
            yield f"model.layers.{block}.{name}.weight", size
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", (shape.vocab, shape.hidden)


def _block(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, wide = shape.hidden, shape.intermediate
    query, value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "input_layernorm", (hidden,)
    if shape.family == "phi3":
        yield "self_attn.qkv_proj", (query + 2 * value, hidden)
    else:
        yield "self_attn.q_proj", (query, hidden)
        yield "self_attn.k_proj", (value, hidden)
        yield "self_attn.v_proj", (value, hidden)
    yield "self_attn.o_proj", (hidden, query)
    yield "post_attention_layernorm", (hidden,)
    if shape.family == "phi3":
        yield "mlp.gate_up_proj", (2 * wide, hidden)
    else:
        yield "mlp.gate_proj", (wide, hidden)
        yield "mlp.up_proj", (wide, hidden)
    yield "mlp.down_proj", (hidden, wide)


def config(shape: Shape) -> dict[str, object]:
    """config.json as the family's publisher writes it. The tokenizer settles the special tokens."""
    phi3 = shape.family == "phi3"
    return {
        "architectures": ["Phi3ForCausalLM" if phi3 else "LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": DEVIATION,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "model_type": shape.family,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": 32000,
        "rms_norm_eps": 1e-05,
        **shape.rope,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def write_checkpoint(shape: Shape, folder: Path, seed: int = 0, shard_nbytes: int = SHARD_NBYTES) -> int:
    """Write the checkpoint to a new or empty folder and return its tensors' bytes. Memory stays below 200 MB.

    The same arguments give the same bytes. Raises FileExistsError if the folder has files, OSError if it cannot be
    written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    shards = _shards(shape, shard_nbytes)
    weight_map: dict[str, str] = {}
    random = np.random.default_rng(seed)
    pool = (random.standard_normal(POOL_ELEMENTS, np.float32) * DEVIATION).astype(ml_dtypes.bfloat16).view(np.uint16)
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        with (folder / name).open("wb") as file:
            _write_shard(file, shard, pool, random)
    total = 2 * shape.parameters
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_tokenizer(folder)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [32007, 32001, 32000]})
    _write_json(folder / "config.json", config(shape))
    return total


def _shards(shape: Shape, shard_nbytes: int) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_nbytes
    for name, size in tensors(shape):
        nbytes = 2 * int(np.prod(size))
        if shards[-1] and nbytes > room:
            shards.append({})
            room = shard_nbytes
        shards[-1][name] = size
        room -= nbytes
    return shards


def _write_shard(
    file: BinaryIO, shard: Mapping[str, tuple[int, ...]], pool: npt.NDArray[np.uint16], random: np.random.Generator
) -> None:
    """https://github.com/huggingface/safetensors#format: u64 header size, JSON header padded to 8 bytes, the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in shard.items():
        end = offset + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for size in shard.values():
        if len(size) == 1:
            file.write(np.ones(size, ml_dtypes.bfloat16).view("<u2").data)
        else:
            _write_random(file, int(np.prod(size)), pool, random)


def _write_random(file: BinaryIO, count: int, pool: npt.NDArray[np.uint16], random: np.random.Generator) -> None:
    """`count` numbers as runs of the pool that begin anywhere: drawing billions of normal numbers takes minutes."""
    while count:
        length = min(count, CHUNK_ELEMENTS)
        start = int(random.integers(0, len(pool) - length + 1))
        file.write(pool[start : start + length].astype("<u2", copy=False).data)
        count -= length


def _write_tokenizer(folder: Path) -> None:
    """A SentencePiece model of Llama's kind, with Phi-3's added tokens; comes with the mistral-common package."""
    names = {index: f"<|placeholder{index - 32001}|>" for index in range(32002, 32010)}
    names |= {32001: "<|assistant|>", 32006: "<|system|>", 32007: "<|end|>", 32010: "<|user|>"}
    rows = {0: ("<unk>", False), 1: ("<s>", False), 2: ("</s>", True), 32000: ("<|endoftext|>", False)}
    rows |= {index: (text, True) for index, text in names.items()}
    flags = {"lstrip": False, "normalized": False, "single_word": False}
    added = {
        str(index): {"content": text, "rstrip": rstrip, "special": index != 2, **flags}
        for index, (text, rstrip) in sorted(rows.items())
    }
    assert max(rows) + 1 == TOKENS
    template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": True,
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    source = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    with resources.as_file(source) as path:
        shutil.copyfile(path, folder / "tokenizer.model")
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "added_tokens.json", {text: index for index, (text, _) in rows.items() if index >= 32000})


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description="Write a random checkpoint.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="another number of blocks than the shape's own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.layers is not None:
        shape = replace(shape, layers=options.layers)
    nbytes = write_checkpoint(shape, options.folder, options.seed)
    print(f"{options.folder}: {shape.parameters / 1e9:.2f} billion parameters, {nbytes / 1e9:.2f} GB of bf16")


if __name__ == "__main__":
    main()
