"""What a weight is for. A module of its own, so that reading a recipe loads no numpy."""

from __future__ import annotations

from enum import Enum


class Role(Enum):
    """What a weight does in the model. The value is the key that recipes use."""

    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    ATTN_Q = "attn_q"
    ATTN_K = "attn_k"
    ATTN_V = "attn_v"
    ATTN_OUTPUT = "attn_output"
    MLP_GATE = "mlp_gate"
    MLP_UP = "mlp_up"
    MLP_DOWN = "mlp_down"
    NORM = "norm"
