"""The mixes of block types that llama-quantize knows by name: which type each matrix gets.

A mix has one type for most matrices and a few rules, by what a matrix does, its layer and the model's shape. They are
those of llama_tensor_get_type in llama.cpp's llama-quant.cpp (2026), for dense models:

1. The output matrix, and the embedding where it is tied to it, gets Q6_K, but Q8_0 where the mix's own type is Q8_0 or
   its blocks do not divide the row. An embedding of its own gets the mix's type.
2. Where llama.cpp stores q, k and v as one matrix (FUSED_QKV), that counts as attn_v.
3. In a `llama` of 80 layers with grouped queries, an attn_v that would get 3 or 4 bits of a K type gets Q5_K.
4. `calibrated` is llama-quantize's has_imatrix: rules of some mixes ask whether column importances are known.

Rows that a type's blocks do not divide are scheme.resolve_scheme's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from converters.quantize.scheme import SCHEMES, Scheme
from converters.role import Role

_OUTPUT_TYPE = "q6_k"
_OUTPUT_FALLBACK = "q8_0"
_FUSED_ROLES = (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V)
_LAYERS_OF_70B = 80

FUSED_QKV = frozenset({"phi3"})  # families whose q, k and v are one matrix in llama.cpp


@dataclass(frozen=True, slots=True)
class Spot:
    """What a mix looks at: a matrix, and the model it belongs to.

    `layer` is None outside the blocks, `row` the number of columns, `queries_per_group` how many query heads share a
    key head, `fused_qkv` whether the container stores q, k and v as one matrix, `tied` whether the embedding is the
    output matrix too.
    """

    role: Role
    layer: int | None
    row: int
    layers: int
    queries_per_group: int
    fused_qkv: bool
    tied: bool
    calibrated: bool

    @property
    def is_output(self) -> bool:
        return self.role is Role.LM_HEAD or (self.role is Role.EMBEDDING and self.tied)

    @property
    def counted_role(self) -> Role:
        """The role that rules see."""
        return Role.ATTN_V if self.fused_qkv and self.role in _FUSED_ROLES else self.role

    @property
    def is_value_of_70b(self) -> bool:
        wide = self.layers == _LAYERS_OF_70B and self.queries_per_group > 1
        return wide and not self.fused_qkv and self.role is Role.ATTN_V

    def before(self, layer: int) -> bool:
        return self.layer is not None and self.layer < layer


Rule = tuple[Callable[[Spot], bool], str]  # where it applies, and the type's scheme there


@dataclass(frozen=True, slots=True)
class Mix:
    """A mix by llama-quantize's name, in lower case. Of a role's rules the first that applies counts, else `base`."""

    name: str
    base: str
    rules: dict[Role, tuple[Rule, ...]]

    def scheme_for(self, spot: Spot) -> Scheme:
        """The type of a matrix, before fallbacks for its row."""
        if spot.is_output:
            fits = spot.row % SCHEMES[self.base].group_size_for(spot.row) == 0
            return SCHEMES[_OUTPUT_TYPE if fits and self.base != _OUTPUT_FALLBACK else _OUTPUT_FALLBACK]
        rules = self.rules.get(spot.counted_role, ())
        name = next((kind for applies, kind in rules if applies(spot)), self.base)
        return SCHEMES["q5_k" if spot.is_value_of_70b and name in ("q3_k", "q4_k") else name]


def _always(spot: Spot) -> bool:
    return True


def _shared_keys(spot: Spot) -> bool:
    return spot.queries_per_group >= 4


def _more_bits(spot: Spot) -> bool:
    """The first and the last eighth of the layers, and every third between: use_more_bits."""
    assert spot.layer is not None
    eighth = spot.layers // 8
    return spot.layer < eighth or spot.layer >= 7 * spot.layers // 8 or (spot.layer - eighth) % 3 == 2


def _first_eighth(spot: Spot) -> bool:
    return spot.before(spot.layers // 8)


def _first_eighth_calibrated(spot: Spot) -> bool:
    return spot.calibrated and _first_eighth(spot)


def _first_eighth_uncalibrated(spot: Spot) -> bool:
    return not spot.calibrated and _first_eighth(spot)


def _medium(name: str, base: str) -> Mix:
    rules: tuple[Rule, ...] = ((_more_bits, "q6_k"),)
    return Mix(name, base, {Role.ATTN_V: rules, Role.MLP_DOWN: rules})


def _nonlinear(name: str) -> Mix:
    rules: dict[Role, tuple[Rule, ...]] = {
        Role.ATTN_V: ((_shared_keys, "q5_k"),),
        Role.MLP_DOWN: ((_first_eighth_uncalibrated, "q5_k"),),
    }
    return Mix(name, name, rules)


MIXES: dict[str, Mix] = {
    mix.name: mix
    for mix in (
        Mix(
            "q2_k",
            "q2_k",
            {
                Role.ATTN_V: ((_shared_keys, "q4_k"), (_always, "q3_k")),
                Role.ATTN_OUTPUT: ((_always, "q3_k"),),
                Role.MLP_DOWN: ((_always, "q3_k"),),
            },
        ),
        Mix("q3_k_s", "q3_k", {}),
        Mix(
            "q3_k_m",
            "q3_k",
            {
                Role.ATTN_V: ((lambda spot: spot.before(2), "q5_k"), (_always, "q4_k")),
                Role.ATTN_OUTPUT: ((_always, "q4_k"),),
                Role.MLP_DOWN: ((lambda spot: spot.before(spot.layers // 16), "q5_k"), (_always, "q4_k")),
            },
        ),
        Mix(
            "q3_k_l",
            "q3_k",
            dict.fromkeys((Role.ATTN_V, Role.ATTN_OUTPUT, Role.MLP_DOWN), ((_always, "q5_k"),)),
        ),
        Mix(
            "q4_k_s",
            "q4_k",
            {
                Role.ATTN_V: ((lambda spot: spot.before(4), "q5_k"),),
                Role.MLP_DOWN: ((_first_eighth, "q5_k"),),
            },
        ),
        _medium("q4_k_m", "q4_k"),
        Mix("q5_k_s", "q5_k", {}),
        _medium("q5_k_m", "q5_k"),
        Mix("q6_k", "q6_k", {}),
        _nonlinear("iq4_nl"),
        _nonlinear("iq4_xs"),
        Mix("q4_0", "q4_0", {Role.MLP_DOWN: ((_first_eighth_calibrated, "q4_1"),)}),
        Mix("q4_1", "q4_1", {}),
        Mix("q5_0", "q5_0", {Role.MLP_DOWN: ((_first_eighth_calibrated, "q5_1"),)}),
        Mix("q5_1", "q5_1", {}),
        Mix("q8_0", "q8_0", {}),
    )
}
