"""Llama 2, 3, 3.1, 3.2, Mistral and SmolLM2: separate projections, plain or llama3-scaled rotary embedding."""

from __future__ import annotations

from converters.architectures.decoder import BlockWeights, build_decoder
from converters.config import ModelConfig
from converters.graph import Graph
from converters.tensors import TensorTable


def build(config: ModelConfig, tensors: TensorTable) -> Graph:
    """The graph of a LlamaForCausalLM or MistralForCausalLM checkpoint; errors as in phi3.build."""
    hidden, inter = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def block(layer: int) -> BlockWeights:
        prefix = f"model.layers.{layer}."
        return BlockWeights(
            attn_norm=tensors.take(prefix + "input_layernorm.weight", (hidden,)),
            attn_q=tensors.take(prefix + "self_attn.q_proj.weight", (q, hidden)),
            attn_k=tensors.take(prefix + "self_attn.k_proj.weight", (kv, hidden)),
            attn_v=tensors.take(prefix + "self_attn.v_proj.weight", (kv, hidden)),
            attn_output=tensors.take(prefix + "self_attn.o_proj.weight", (hidden, q)),
            mlp_norm=tensors.take(prefix + "post_attention_layernorm.weight", (hidden,)),
            mlp_gate=tensors.take(prefix + "mlp.gate_proj.weight", (inter, hidden)),
            mlp_up=tensors.take(prefix + "mlp.up_proj.weight", (inter, hidden)),
            mlp_down=tensors.take(prefix + "mlp.down_proj.weight", (hidden, inter)),
        )

    return build_decoder(config, tensors, block)
