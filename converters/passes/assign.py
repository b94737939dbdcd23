"""Pass: give every weight the scheme that it will be stored in.

    Weight(fp32) --default, overrides by role--> Weight(int4_g32 | int8_g32 | q4_k | fp16 | ...)

1. Norms stay fp32: they are small and the containers want them in floats.
2. A role's override wins over the default.
3. A matrix used as both embedding and head takes the more precise of the two roles' schemes.
4. A default that is a mix chooses by role, layer and the model's shape (quantize.ggml.mixes). Where it has an output
   type, rule 3 looks at overrides alone.
5. A scheme whose groups or blocks do not divide a row is resolved by scheme.resolve_scheme.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from converters.config import ModelConfig
from converters.graph import Graph, Weight
from converters.quantize.ggml.mixes import FUSED_QKV, Mix, Spot
from converters.quantize.scheme import FP32, Scheme, resolve_scheme
from converters.role import Role


def requested_scheme(
    graph: Graph, weight: Weight, default: Scheme | Mix, overrides: Mapping[Role, Scheme], calibrated: bool = False
) -> Scheme:
    """The scheme that the recipe asks for, by rules 1 to 4. `calibrated`: column importances will be known."""
    if len(weight.shape) < 2:
        return FP32
    tied = weight.role is Role.EMBEDDING and graph.config.tie_embeddings
    roles = (Role.EMBEDDING, Role.LM_HEAD) if tied else (weight.role,)
    if isinstance(default, Mix):
        own = [overrides[role] for role in roles if role in overrides]
        candidates = own or [default.scheme_for(_spot(graph.config, weight, calibrated))]
    else:
        candidates = [overrides.get(role, default) for role in roles]
    return max(candidates, key=lambda scheme: scheme.bits)


def assign_schemes(
    graph: Graph, default: Scheme | Mix, overrides: Mapping[Role, Scheme], calibrated: bool = False
) -> Graph:
    """A new graph whose weights carry their final schemes. `calibrated`: column importances will be known."""

    def assign(weight: Weight) -> Weight:
        requested = requested_scheme(graph, weight, default, overrides, calibrated)
        return replace(weight, scheme=resolve_scheme(requested, weight.shape[-1]))

    return graph.map_weights(assign)


def with_schemes(graph: Graph, schemes: Mapping[str, Scheme]) -> Graph:
    """A new graph in which these weights, by name, have these schemes."""
    return graph.map_weights(lambda weight: replace(weight, scheme=schemes.get(weight.name, weight.scheme)))


def _spot(config: ModelConfig, weight: Weight, calibrated: bool) -> Spot:
    return Spot(
        role=weight.role,
        layer=weight.layer,
        row=weight.shape[-1],
        layers=config.num_layers,
        queries_per_group=config.num_heads // config.num_kv_heads,
        fused_qkv=config.family in FUSED_QKV,
        tied=config.tie_embeddings,
        calibrated=calibrated,
    )
