"""SmolLM2's GGUF file as a Phi-3 checkpoint in Hugging Face's format.

The Llama blocks inside compute the same function as Phi-3 blocks once q, k, v and gate, up are stacked. Weights that
are merely dequantized would flatter every 4-bit scheme, as they lie on Q4_1's own grid: groups of 32 neighbouring
inputs. So channels are reordered in ways that keep the function, which mixes the groups. One rest stays: columns of
o_proj can only move inside their head of 64, so that its 4-bit error is still about a tenth too small.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize

MAX_SHARD_NBYTES = 100_000_000

F32: TypeAlias = npt.NDArray[np.float32]
Order: TypeAlias = npt.NDArray[np.intp]
ReadTensor: TypeAlias = Callable[[str], F32]


def write_checkpoint(gguf: Path, folder: Path, seed: int) -> None:
    """Write weights, configuration and tokenizer files of the llama-architecture file `gguf` to `folder`.

    The same inputs give the same bytes. Weights are held one shard at a time. Raises OSError if `folder` cannot be
    written.
    """
    source = GgufSource(GGUFReader(gguf))
    shape = source.shape()
    _write_shards(folder, phi3_tensors(source.read, shape, draw_shuffle(shape, seed)))
    _write_json(folder / "config.json", phi3_config(source))
    _write_json(folder / "generation_config.json", _token_roles(source))
    _write_tokenizer(folder, source)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama or Phi-3 decoder, in channels, heads and blocks."""

    vocab: int
    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A llama-architecture GGUF file, read tensor by tensor in Hugging Face's layout."""

    reader: GGUFReader

    def value(self, key: str) -> str | int | float | bool | list[str] | list[int]:
        field = self.reader.get_field(key)
        if field is None:
            raise KeyError(key)
        contents: str | int | float | bool | list[str] | list[int] = field.contents()
        return contents

    def integer(self, key: str) -> int:
        value = self.value(key)
        assert isinstance(value, int), key
        return value

    def real(self, key: str) -> float:
        """A float32 as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
        value = self.value(key)
        assert isinstance(value, float), key
        return float(str(np.float32(value)))

    def text(self, key: str) -> str:
        return str(self.value(key))

    def texts(self, key: str) -> list[str]:
        value = self.value(key)
        assert isinstance(value, list), key
        return [str(item) for item in value]

    def shape(self) -> Shape:
        return Shape(
            vocab=self.integer("llama.vocab_size"),
            hidden=self.integer("llama.embedding_length"),
            intermediate=self.integer("llama.feed_forward_length"),
            blocks=self.integer("llama.block_count"),
            heads=self.integer("llama.attention.head_count"),
            kv_heads=self.integer("llama.attention.head_count_kv"),
        )

    def read(self, name: str) -> F32:
        """Tensor `name` as f32[out, in] (norms f32[channels]), with q and k in rotate-half row order."""
        (tensor,) = [tensor for tensor in self.reader.tensors if tensor.name == name]
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if name.endswith((".attn_q.weight", ".attn_k.weight")):
            return pairs_to_halves(weight, self.shape().head_dim)
        return weight


def pairs_to_halves(weight: F32, head_dim: int) -> F32:
    """f32[heads * head_dim, in], rows ordered as rotated pairs (x0 y0 x1 y1 …), to halves (x0 x1 … y0 y1 …).

    GGUF's llama architecture rotates neighbouring rows; Hugging Face's models rotate row i with row i + head_dim/2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


@dataclass(frozen=True, slots=True)
class Shuffle:
    """New orders of channels that leave the function unchanged; position i takes what was at order[i].

    residual: [hidden]; mlp: a [intermediate] for each block; value: a [kv_heads, head_dim] for each block.
    """

    residual: Order
    mlp: tuple[Order, ...]
    value: tuple[Order, ...]


def draw_shuffle(shape: Shape, seed: int) -> Shuffle:
    """A random shuffle from the raw PCG64 stream, which NumPy keeps stable; its `permutation` method it may change."""
    bits = np.random.PCG64(seed)

    def order(size: int) -> Order:
        return np.argsort(bits.random_raw(size), kind="stable")

    return Shuffle(
        residual=order(shape.hidden),
        mlp=tuple(order(shape.intermediate) for _ in range(shape.blocks)),
        value=tuple(np.stack([order(shape.head_dim) for _ in range(shape.kv_heads)]) for _ in range(shape.blocks)),
    )


def phi3_tensors(read: ReadTensor, shape: Shape, shuffle: Shuffle) -> Iterator[tuple[str, F32]]:
    """The Phi-3 checkpoint's tensors, in the order of the network, from a Llama model's by their GGUF names.

    `read` gives q and k in rotate-half row order. Matrices are f32[out, in], norms f32[hidden].
    """
    residual = shuffle.residual
    yield "model.embed_tokens.weight", read("token_embd.weight")[:, residual]
    for block in range(shape.blocks):
        yield from _block_tensors(read, shape, shuffle, block)
    yield "model.norm.weight", read("output_norm.weight")[residual]


def _block_tensors(read: ReadTensor, shape: Shape, shuffle: Shuffle, block: int) -> Iterator[tuple[str, F32]]:
    residual, mlp, value = shuffle.residual, shuffle.mlp[block], shuffle.value[block]
    source, target = f"blk.{block}", f"model.layers.{block}"
    value_rows = _head_rows(value)
    # Attention mixes positions, never channels: an output channel of a query head is the same channel of its kv head.
    output_columns = _head_rows(np.repeat(value, shape.heads // shape.kv_heads, axis=0))

    q, k, v = (read(f"{source}.attn_{part}.weight") for part in "qkv")
    qkv = np.concatenate([q, k, v[value_rows]])[:, residual]
    output = read(f"{source}.attn_output.weight")[np.ix_(residual, output_columns)]
    gate, up = (read(f"{source}.ffn_{part}.weight") for part in ("gate", "up"))
    gate_up = np.concatenate([gate[mlp], up[mlp]])[:, residual]
    down = read(f"{source}.ffn_down.weight")[np.ix_(residual, mlp)]

    yield f"{target}.input_layernorm.weight", read(f"{source}.attn_norm.weight")[residual]
    yield f"{target}.self_attn.qkv_proj.weight", qkv
    yield f"{target}.self_attn.o_proj.weight", output
    yield f"{target}.post_attention_layernorm.weight", read(f"{source}.ffn_norm.weight")[residual]
    yield f"{target}.mlp.gate_up_proj.weight", gate_up
    yield f"{target}.mlp.down_proj.weight", down


def _head_rows(order: Order) -> Order:
    """Orders inside each head, [heads, head_dim], as one order of all rows, [heads * head_dim]."""
    heads, head_dim = order.shape
    rows: Order = order + np.arange(heads)[:, None] * head_dim
    return rows.reshape(-1)


def to_bf16(values: F32) -> npt.NDArray[np.uint16]:
    """Finite f32 rounded to the nearest bfloat16, ties to even, as its 16 bits."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def _write_shards(folder: Path, tensors: Iterator[tuple[str, F32]]) -> None:
    """bf16 safetensors shards of at most MAX_SHARD_NBYTES and their index; one shard is in memory at a time."""
    shards: list[list[str]] = []
    total_nbytes = 0
    for number, shard in enumerate(_fill_shards(tensors), 1):
        _write_safetensors(folder / f"{number}.part", shard)
        shards.append(list(shard))
        total_nbytes += sum(tensor.nbytes for tensor in shard.values())
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.part").rename(folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total_nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _fill_shards(tensors: Iterator[tuple[str, F32]]) -> Iterator[dict[str, npt.NDArray[np.uint16]]]:
    shard: dict[str, npt.NDArray[np.uint16]] = {}
    nbytes = 0
    for name, values in tensors:
        tensor = to_bf16(values)
        if shard and nbytes + tensor.nbytes > MAX_SHARD_NBYTES:
            yield shard
            shard, nbytes = {}, 0
        shard[name] = tensor
        nbytes += tensor.nbytes
    yield shard


def _write_safetensors(path: Path, tensors: dict[str, npt.NDArray[np.uint16]]) -> None:
    """https://github.com/huggingface/safetensors#format: u64 header size, JSON header padded to 8 bytes, the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            stream.write(tensor.astype("<u2", copy=False).data)


def phi3_config(source: GgufSource) -> dict[str, object]:
    """config.json with the keys that microsoft's Phi-3 checkpoints have."""
    shape, context = source.shape(), source.integer("llama.context_length")
    config: dict[str, object] = {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": context,
        "model_type": "phi3",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.blocks,
        "num_key_value_heads": shape.kv_heads,
        "original_max_position_embeddings": context,
        "resid_pdrop": 0.0,
        "rms_norm_eps": source.real("llama.attention.layer_norm_rms_epsilon"),
        "rope_scaling": None,
        "rope_theta": source.real("llama.rope.freq_base"),
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    return dict(sorted((config | _token_roles(source)).items()))


def _token_roles(source: GgufSource) -> dict[str, object]:
    return {
        "bos_token_id": source.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": source.integer("tokenizer.ggml.eos_token_id"),
        "pad_token_id": source.integer("tokenizer.ggml.padding_token_id"),
    }


def _write_tokenizer(folder: Path, source: GgufSource) -> None:
    tokens = source.texts("tokenizer.ggml.tokens")
    kinds = source.value("tokenizer.ggml.token_type")
    assert isinstance(kinds, list)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = {i: {"content": tokens[i], **flags} for i, kind in enumerate(kinds) if kind == TokenType.CONTROL}
    bos, eos, pad, unknown = (
        tokens[source.integer(f"tokenizer.ggml.{role}_token_id")] for role in ("bos", "eos", "padding", "unknown")
    )
    special = {
        "additional_special_tokens": [bos, eos],
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unknown,
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.integer("llama.context_length"),
        "tokenizer_class": "GPT2Tokenizer",
        **special,
    }
    added_tokens = [{"id": i, **token} for i, token in added.items()]
    _write_json(folder / "tokenizer.json", tokenizer_json(tokens, source.texts("tokenizer.ggml.merges"), added_tokens))
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special)
    template = source.text("tokenizer.chat_template")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")


def tokenizer_json(tokens: list[str], merges: list[str], added_tokens: list[dict[str, object]]) -> dict[str, object]:
    """Byte-level BPE as the `tokenizers` library stores it; each digit is a word of its own (GGUF's `smollm`)."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
