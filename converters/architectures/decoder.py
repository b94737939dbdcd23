"""The block that Llama-like families share; a family file says only where its weights come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from converters.checkpoint import TensorSource, same_numbers
from converters.config import ModelConfig
from converters.graph import LOGITS, TOKEN_IDS, Graph, Node, Weight, infer_shapes
from converters.ops import Add, Attention, Embedding, Linear, RmsNorm, SwiGlu
from converters.role import Role
from converters.tensors import TensorTable

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """The nine weights of one decoder block, each [out, in] (norms [hidden])."""

    attn_norm: TensorSource
    attn_q: TensorSource
    attn_k: TensorSource
    attn_v: TensorSource
    attn_output: TensorSource
    mlp_norm: TensorSource
    mlp_gate: TensorSource
    mlp_up: TensorSource
    mlp_down: TensorSource


def build_decoder(config: ModelConfig, tensors: TensorTable, block: Callable[[int], BlockWeights]) -> Graph:
    """Embedding, `num_layers` pre-norm blocks, final norm and head, in execution order.

    The graph's config is untied where the checkpoint's own head turns out to be another one than its embedding.
    """
    tensors.drop_rotary_buffers()
    nodes: list[Node] = []
    weights: dict[str, Weight] = {}

    def weight(name: str, role: Role, source: TensorSource, layer: int | None = None) -> str:
        weights[name] = Weight(name, role, layer, source)
        return name

    config, table, own_head = _ends(config, tensors)
    embedding = weight("embedding", Role.EMBEDDING, table)
    nodes.append(Node("embedded", Embedding((embedding,)), (TOKEN_IDS,)))
    hidden = "embedded"
    for layer in range(config.num_layers):
        block_nodes, block_weights = decoder_block(config, layer, block(layer), hidden)
        nodes += block_nodes
        weights |= block_weights
        hidden = block_nodes[-1].name
    norm = weight("final_norm", Role.NORM, tensors.take("model.norm.weight", (config.hidden_size,)))
    nodes.append(Node("final_normed", RmsNorm((norm,), config.rms_norm_eps), (hidden,)))
    head = embedding if own_head is None else weight("lm_head", Role.LM_HEAD, own_head)
    nodes.append(Node(LOGITS, Linear((head,)), ("final_normed",)))
    tensors.finish()
    graph = Graph(config, tuple(nodes), weights, tensors.dropped)
    infer_shapes(graph, 1, 2)
    return graph


def _ends(config: ModelConfig, tensors: TensorTable) -> tuple[ModelConfig, TensorSource, TensorSource | None]:
    """The embedding, and the head if it is not tied to it, each [vocab, hidden].

    As transformers 5 does: of tied ones, the one that is there stands for both; if both are there and differ, as a
    merge of a trained head leaves them, they are not tied.
    """
    shape = (config.vocab_size, config.hidden_size)
    if config.tie_embeddings and _HEAD in tensors and _EMBEDDING not in tensors:
        return config, tensors.take(_HEAD, shape), None
    embedding = tensors.take(_EMBEDDING, shape)
    if not config.tie_embeddings:
        return config, embedding, tensors.take(_HEAD, shape)
    if _HEAD not in tensors:
        return config, embedding, None
    head = tensors.take(_HEAD, shape)
    if same_numbers(embedding, head):
        tensors.drop(_HEAD, "tied to the embedding")
        return config, embedding, None
    note = f"tie_word_embeddings is true, but {_HEAD} differs from {_EMBEDDING}: they are not tied"
    return replace(config, tie_embeddings=False, notes=(*config.notes, note)), embedding, head


def decoder_block(
    config: ModelConfig, layer: int, sources: BlockWeights, hidden: str
) -> tuple[list[Node], dict[str, Weight]]:
    """One block: norm, attention, residual, norm, gated MLP, residual."""
    prefix = f"blocks.{layer}."
    roles = {
        "attn_norm": Role.NORM,
        "attn_q": Role.ATTN_Q,
        "attn_k": Role.ATTN_K,
        "attn_v": Role.ATTN_V,
        "attn_output": Role.ATTN_OUTPUT,
        "mlp_norm": Role.NORM,
        "mlp_gate": Role.MLP_GATE,
        "mlp_up": Role.MLP_UP,
        "mlp_down": Role.MLP_DOWN,
    }
    weights = {
        prefix + name: Weight(prefix + name, role, layer, getattr(sources, name)) for name, role in roles.items()
    }

    def names(*short: str) -> tuple[str, ...]:
        return tuple(prefix + name for name in short)

    attention = Attention(
        (), layer, config.num_heads, config.num_kv_heads, config.head_dim, config.sliding_window, config.rope
    )
    eps = config.rms_norm_eps
    nodes = [
        Node(prefix + "attn_normed", RmsNorm(names("attn_norm"), eps), (hidden,), layer),
        Node(prefix + "qkv", Linear(names("attn_q", "attn_k", "attn_v")), names("attn_normed"), layer),
        Node(prefix + "attention", attention, names("qkv"), layer),
        Node(prefix + "attn_out", Linear(names("attn_output")), names("attention"), layer),
        Node(prefix + "attn_residual", Add(), (hidden, prefix + "attn_out"), layer),
        Node(prefix + "mlp_normed", RmsNorm(names("mlp_norm"), eps), names("attn_residual"), layer),
        Node(prefix + "gate_up", Linear(names("mlp_gate", "mlp_up")), names("mlp_normed"), layer),
        Node(prefix + "activated", SwiGlu(), names("gate_up"), layer),
        Node(prefix + "mlp_out", Linear(names("mlp_down")), names("activated"), layer),
        Node(prefix + "residual", Add(), names("attn_residual", "mlp_out"), layer),
    ]
    return nodes, weights
