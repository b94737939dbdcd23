"""How weights become Constants: which weights share one matrix, and the constants that hold a matrix.

An integer matrix is three constants at most, in the arrangement that the plugins recognize as compressed weights:

    codes [N, groups, group_size] -> Convert(f16) [-> Subtract(zero [N, groups, 1])] -> Multiply(scale [N, groups, 1])
        -> Reshape [N, K] -> Convert(f32)

With one group a row the group axis is left out: codes [N, K], scale [N, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from converters.graph import Graph, Weight
from converters.quantize.scheme import NumberType, Scheme
from converters.quantize.tensor import U8, Tensor
from exporters.openvino import pack

BITS = {"f32": 32, "f16": 16, "bf16": 16, "i8": 8, "u8": 8, "i4": 4, "u4": 4}


@dataclass(frozen=True, slots=True)
class Stored:
    """One Constant of the IR that weights are streamed into. `type` is OpenVINO's element type name."""

    name: str
    type: str
    shape: tuple[int, ...]
    pack: Callable[[Tensor], U8]

    @property
    def row_nbytes(self) -> int:
        elements = 1
        for size in self.shape[1:]:
            elements *= size
        nbytes, rest = divmod(elements * BITS[self.type], 8)
        assert rest == 0, f"rows of {self.name} do not start at whole bytes"
        return nbytes

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_nbytes


@dataclass(frozen=True, slots=True)
class Matrix:
    """Weights stacked along the output axis and stored together, or a single norm. `rows` are theirs, in order."""

    name: str
    weights: tuple[str, ...]
    rows: tuple[int, ...]
    width: int | None  # input features; None for a norm
    scheme: Scheme

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(self.rows),) if self.width is None else (sum(self.rows), self.width)

    @property
    def group_size(self) -> int:
        assert self.width is not None
        return self.scheme.group_size_for(self.width)

    @property
    def groups(self) -> int:
        assert self.width is not None
        return self.width // self.group_size

    def constants(self) -> dict[str, Stored]:
        """The constants by part: `weight` of a float matrix; `codes`, `scale` and maybe `zero` of a quantized one."""
        if not self.scheme.is_integer:
            kind, packer = _FLOATS[self.scheme.type, self.scheme.bits]
            return {"weight": Stored(self.name + ".weight", kind, self.shape, packer)}
        parts = {"codes": self._codes(), "scale": self._per_group("scale", "f16", pack.pack_scale)}
        if not self.scheme.symmetric:
            # A row of an odd number of 4-bit zeros would end inside a byte.
            narrow = self.scheme.bits == 4 and self.groups % 2 == 0
            parts["zero"] = (
                self._per_group("zero", "u4", pack.pack_zero_u4)
                if narrow
                else self._per_group("zero", "u8", pack.pack_zero_u8)
            )
        return parts

    def _codes(self) -> Stored:
        kind, packer = _CODES[self.scheme.bits, self.scheme.symmetric]
        rows, width = self.shape
        shape = (rows, width) if self.groups == 1 else (rows, self.groups, self.group_size)
        return Stored(self.name + ".codes", kind, shape, packer)

    def _per_group(self, part: str, kind: str, packer: Callable[[Tensor], U8]) -> Stored:
        rows = self.shape[0]
        shape = (rows, 1) if self.groups == 1 else (rows, self.groups, 1)
        return Stored(f"{self.name}.{part}", kind, shape, packer)


_FLOATS: Mapping[tuple[NumberType, int], tuple[str, Callable[[Tensor], U8]]] = {
    (NumberType.FLOAT, 32): ("f32", pack.pack_f32),
    (NumberType.FLOAT, 16): ("f16", pack.pack_f16),
    (NumberType.BFLOAT, 16): ("bf16", pack.pack_bf16),
}

_CODES: Mapping[tuple[int, bool], tuple[str, Callable[[Tensor], U8]]] = {
    (4, True): ("i4", pack.pack_i4),
    (4, False): ("u4", pack.pack_u4),
    (8, True): ("i8", pack.pack_i8),
    (8, False): ("u8", pack.pack_u8),
}


def plan_matrices(graph: Graph) -> tuple[Matrix, ...]:
    """The matrices in the order in which the model uses them; each weight is in exactly one.

    Weights that a node stacks form one matrix if their schemes agree, otherwise each is its own. A tied embedding is
    one matrix with two users.
    """
    matrices: list[Matrix] = []
    placed: set[str] = set()
    for node in graph.nodes:
        weights = [graph.weights[name] for name in node.op.weights]
        if placed.isdisjoint(node.op.weights) and len({weight.scheme for weight in weights}) == 1:
            matrices.append(_matrix(weights[0].name if len(weights) == 1 else node.name, weights))
        else:
            matrices += [_matrix(weight.name, [weight]) for weight in weights if weight.name not in placed]
        placed.update(node.op.weights)
    return tuple(matrices)


def _matrix(name: str, weights: list[Weight]) -> Matrix:
    shape = weights[0].shape
    return Matrix(
        name,
        tuple(weight.name for weight in weights),
        tuple(weight.shape[0] for weight in weights),
        shape[1] if len(shape) == 2 else None,
        weights[0].scheme,
    )
