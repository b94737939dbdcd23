"""Stored weights: the initializers that hold them and the places that the job fills.

Several weights of one scheme are stored as one matrix, one below the other: groups run along the input axis, so rows
are independent and the stack's numbers are those of its parts. A matrix that two operators read in different shapes
(a tied 4-bit embedding) is stored once: two initializers name the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import onnx

from converters.graph import Weight
from converters.quantize.scheme import Scheme
from converters.quantize.tensor import U8, QuantTensor, Tensor
from exporters.base import Place
from exporters.floats import pack_floats
from exporters.onnx import pack
from exporters.onnx.data_file import ONNX_TYPES, DataFile, external_tensor
from exporters.onnx.names import DATA_FILE
from exporters.onnx.settings import NUMPY_TYPES, Settings, float_type


@dataclass(frozen=True, slots=True)
class Region:
    """Rows of bytes in the data file."""

    offset: int
    row_nbytes: int
    rows: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_nbytes


@dataclass(frozen=True, slots=True)
class Matrix:
    """Weights stacked along the output axis. Floats have no scales, most symmetric integers no zeros."""

    name: str
    scheme: Scheme
    rows: int
    width: int
    values: Region
    scales: Region | None
    zeros: Region | None
    block: int  # elements per scale; 0 for floats


@dataclass(slots=True)
class Matrices:
    """All stored weights of an artifact, laid out in the order they are first asked for."""

    weights: Mapping[str, Weight]
    settings: Settings
    data: DataFile
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=dict)
    _stored: dict[tuple[str, ...], Matrix] = field(default_factory=dict)

    def matrix(self, names: tuple[str, ...]) -> Matrix:
        """The matrix of these weights, all of one scheme, laid out now if it was not before."""
        if names not in self._stored:
            self._stored[names] = self._lay_out(names)
        return self._stored[names]

    def vector(self, name: str) -> str:
        """The initializer of a norm weight [hidden], in the activations' type, which the norm operators demand."""
        if name not in self.initializers:
            dtype = self.settings.numpy_type
            packer = partial(pack_floats, dtype=dtype, where=f"target onnx, weight {name}")
            region = self._region([self.weights[name]], dtype.itemsize, packer)
            self._initialize(name, ONNX_TYPES[self.settings.activations], (region.rows,), region)
        return name

    def floats(self, matrix: Matrix) -> str:
        """The initializer [N, K] of a float matrix, in its scheme's type."""
        return self._initialize(
            matrix.name, ONNX_TYPES[float_type(matrix.scheme)], (matrix.rows, matrix.width), matrix.values
        )

    def codes(self, matrix: Matrix) -> str:
        """Input B of MatMulNBits: u8[N, K / block, block * bits / 8]."""
        blocks = matrix.width // matrix.block
        shape = matrix.rows, blocks, matrix.values.row_nbytes // blocks
        return self._initialize(f"{matrix.name}.codes", onnx.TensorProto.UINT8, shape, matrix.values)

    def flat_codes(self, matrix: Matrix) -> str:
        """The same bytes as u8[N, K * bits / 8], for gathering rows."""
        shape = matrix.rows, matrix.values.row_nbytes
        return self._initialize(f"{matrix.name}.rows", onnx.TensorProto.UINT8, shape, matrix.values)

    def quantization(self, matrix: Matrix) -> tuple[str, ...]:
        """scales [N, K / block] and, where they are stored, packed zero_points u8[N, ...]."""
        assert matrix.scales is not None
        groups = matrix.width // matrix.block
        shape = matrix.rows, groups
        scales = self._initialize(f"{matrix.name}.scales", ONNX_TYPES[self.settings.activations], shape, matrix.scales)
        if matrix.zeros is None:
            return (scales,)
        shape = matrix.rows, matrix.zeros.row_nbytes
        return scales, self._initialize(f"{matrix.name}.zeros", onnx.TensorProto.UINT8, shape, matrix.zeros)

    def _lay_out(self, names: tuple[str, ...]) -> Matrix:
        weights = [self.weights[name] for name in names]
        scheme, width = weights[0].scheme, weights[0].shape[1]
        assert all(weight.scheme == scheme and weight.shape[1] == width for weight in weights), names
        rows = sum(weight.shape[0] for weight in weights)
        name = stack_name(names)
        if not scheme.is_integer:
            dtype = NUMPY_TYPES[float_type(scheme)]
            packer = partial(pack_floats, dtype=dtype, where=f"target onnx, weight {name}")
            values = self._region(weights, width * dtype.itemsize, packer)
            return Matrix(name, scheme, rows, width, values, None, None, 0)
        block, dtype = self.settings.block_size(scheme, width), self.settings.numpy_type
        groups = width // block
        values = self._region(weights, width * scheme.bits // 8, _of_codes(pack.pack_codes))
        pack_scales = _of_codes(partial(pack.pack_scales, block=block, dtype=dtype))
        scales = self._region(weights, groups * dtype.itemsize, pack_scales)
        zeros = None
        if self.settings.stores_zeros(scheme):
            pack_zeros = _of_codes(partial(pack.pack_zeros, block=block))
            zeros = self._region(weights, -(-groups * scheme.bits // 8), pack_zeros)
        return Matrix(name, scheme, rows, width, values, scales, zeros, block)

    def _region(self, weights: Sequence[Weight], row_nbytes: int, packer: Callable[[Tensor], U8]) -> Region:
        """Bytes for the rows of these weights, one weight after the other."""
        region = Region(0, row_nbytes, sum(weight.shape[0] for weight in weights))
        region = Region(self.data.reserve(region.nbytes), row_nbytes, region.rows)
        offset = region.offset
        for weight in weights:
            self.places.setdefault(weight.name, []).append(Place(DATA_FILE, offset, row_nbytes, packer))
            offset += weight.shape[0] * row_nbytes
        return region

    def _initialize(self, name: str, onnx_type: int, shape: tuple[int, ...], region: Region) -> str:
        if name not in self.initializers:
            self.initializers[name] = external_tensor(name, onnx_type, shape, region.offset, region.nbytes)
        return name


def stack_name(names: Sequence[str]) -> str:
    """The name of a stack of weights: blocks.0.attn_q, .attn_k, .attn_v -> blocks.0.attn_q+attn_k+attn_v."""
    return "+".join([names[0], *(name.rsplit(".", 1)[-1] for name in names[1:])])


def _of_codes(packer: Callable[[QuantTensor], U8]) -> Callable[[Tensor], U8]:
    def packed(tensor: Tensor) -> U8:
        assert isinstance(tensor, QuantTensor)
        return packer(tensor)

    return packed
