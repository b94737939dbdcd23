"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused qkv and gate/up projections, LongRoPE, partial rotary."""

from __future__ import annotations

from converters.architectures.decoder import BlockWeights, build_decoder
from converters.checkpoint import RowView
from converters.config import ModelConfig
from converters.graph import Graph
from converters.tensors import TensorTable


def build(config: ModelConfig, tensors: TensorTable) -> Graph:
    """The graph of a Phi3ForCausalLM checkpoint; ModelError if a tensor is missing, misshapen or left over."""
    hidden, inter = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def block(layer: int) -> BlockWeights:
        prefix = f"model.layers.{layer}."
        qkv = tensors.take(prefix + "self_attn.qkv_proj.weight", (q + 2 * kv, hidden))
        gate_up = tensors.take(prefix + "mlp.gate_up_proj.weight", (2 * inter, hidden))
        return BlockWeights(
            attn_norm=tensors.take(prefix + "input_layernorm.weight", (hidden,)),
            attn_q=RowView(qkv, 0, q),
            attn_k=RowView(qkv, q, q + kv),
            attn_v=RowView(qkv, q + kv, q + 2 * kv),
            attn_output=tensors.take(prefix + "self_attn.o_proj.weight", (hidden, q)),
            mlp_norm=tensors.take(prefix + "post_attention_layernorm.weight", (hidden,)),
            mlp_gate=RowView(gate_up, 0, inter),
            mlp_up=RowView(gate_up, inter, 2 * inter),
            mlp_down=tensors.take(prefix + "mlp.down_proj.weight", (hidden, inter)),
        )

    return build_decoder(config, tensors, block)
