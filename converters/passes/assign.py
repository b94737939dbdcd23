"""Pass: give every weight the scheme that it will be stored in.

    Weight(fp32) --default, overrides by role--> Weight(int4_g32 | int8_g32 | fp16 | ...)

1. Norms stay fp32: they are small and the containers want them in floats.
2. A role's override wins over the default.
3. A matrix used as both embedding and head takes the more precise of the two roles' schemes.
4. A group size that does not divide a row is resolved by scheme.resolve_scheme.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from converters.graph import Graph, Weight
from converters.quantize.scheme import FP32, Scheme, resolve_scheme
from converters.role import Role


def requested_scheme(graph: Graph, weight: Weight, default: Scheme, overrides: Mapping[Role, Scheme]) -> Scheme:
    """The scheme that the recipe asks for, by rules 1 to 3."""
    if len(weight.shape) < 2:
        return FP32
    scheme = overrides.get(weight.role, default)
    if weight.role is Role.EMBEDDING and graph.config.tie_embeddings:
        return max(scheme, overrides.get(Role.LM_HEAD, default), key=lambda candidate: candidate.bits)
    return scheme


def assign_schemes(graph: Graph, default: Scheme, overrides: Mapping[Role, Scheme]) -> Graph:
    """A new graph whose weights carry their final schemes."""

    def assign(weight: Weight) -> Weight:
        requested = requested_scheme(graph, weight, default, overrides)
        return replace(weight, scheme=resolve_scheme(requested, weight.shape[-1]))

    return graph.map_weights(assign)
