"""GGUF files, opened with suspicion: nothing is allocated or walked that the file is not large enough to hold.

Layout, little-endian: "GGUF", u32 version, u64 tensors, u64 fields; each field a name, a u32 type and a value; each
tensor a name, u32 dimensions, u64 sizes (the innermost first), u32 type, u64 offset into the data, which begins at the
next multiple of general.alignment (ggml's docs/gguf.md, versions 2 and 3). gguf-py's reader makes objects of every
element of every array, and believes the header.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from converters.json_file import regular_size
from converters.quantize.tensor import F32

_SCALARS = {
    GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.UINT16: "<H", GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i", GGUFValueType.FLOAT32: "<f", GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q", GGUFValueType.INT64: "<q", GGUFValueType.FLOAT64: "<d",
}  # fmt: skip
_MAX_ENTRIES = 1 << 20  # fields or tensors
_MAX_STRINGS = 1 << 22  # in an array
_MAX_DIMS = 4
_MAX_TEXT = 1 << 24  # bytes of a string; chat templates are long
_KEPT = 1 << 10  # elements of arrays that are kept; longer ones are vocabularies, which nobody here asks for

Value = bool | int | float | str | list[str] | None
"""None: an array of numbers, or a long one."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """`shape` is [out, in], the reverse of the file's order; `offset` counts bytes from the start of the file."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What is in a file: fields and tensors by name."""

    path: Path
    fields: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]

    def values(self, name: str) -> F32:
        """A tensor's numbers, f32 of its shape; read from the disk as needed. ValueError if gguf-py lacks its type."""
        tensor = self.tensors[name]
        block, size = GGML_QUANT_SIZES[tensor.type]
        *outer, width = tensor.shape or (1,)
        if not tensor.nbytes:
            return np.zeros(tensor.shape, np.float32)
        stored = np.memmap(self.path, np.uint8, "r", tensor.offset, (*outer, width // block * size))
        try:
            values: F32 = dequantize(stored, tensor.type).reshape(tensor.shape)
        except NotImplementedError as error:
            raise ValueError(f"tensor {name} of type {tensor.type.name}, which gguf-py does not read") from error
        return values


def read_gguf(path: Path) -> GgufFile:
    """Fields and tensors of a file. ValueError says what is wrong in it, OSError that it cannot be read."""
    size = regular_size(path)
    if size < 24:
        raise ValueError(f"a GGUF file of {size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data)
        magic, version = reader.take(4), reader.number("<I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"begins with {magic!r}, version {version}; expected GGUF, 2 or 3")
        tensor_count, field_count = (reader.count("<Q", _MAX_ENTRIES, what) for what in ("tensors", "fields"))
        fields = dict(reader.field() for _ in range(field_count))
        listed = [reader.tensor() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise ValueError(f"general.alignment {alignment}")
        start = math.ceil(reader.offset / alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in listed:
        block, block_size = GGML_QUANT_SIZES[kind]
        nbytes = math.prod(shape) // block * block_size
        *_, width = shape or (1,)
        if width % block:
            raise ValueError(f"tensor {name}: rows of {width} in blocks of {block}")
        if name in tensors:
            raise ValueError(f"two tensors {name}")
        if nbytes and start + offset + nbytes > size:
            raise ValueError(f"tensor {name} of {nbytes} bytes at byte {start + offset} of {size}")
        tensors[name] = GgufTensor(name, kind, shape, start + offset, nbytes)
    _require_apart(tensors)
    return GgufFile(path, fields, tensors)


def _require_apart(tensors: Mapping[str, GgufTensor]) -> None:
    """Of tensors that share bytes a small file could list so many that they fill the memory."""
    end = 0
    for tensor in sorted(tensors.values(), key=lambda each: (each.offset, each.nbytes)):
        if tensor.nbytes and tensor.offset < end:
            raise ValueError(f"tensor {tensor.name} at byte {tensor.offset} overlaps one that ends at {end}")
        end = max(end, tensor.offset + tensor.nbytes)


class _Reader:
    """Goes through a header from its start."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.offset = data, 0

    def take(self, nbytes: int) -> bytes:
        taken = self.data[self.offset : self.offset + nbytes]
        if len(taken) != nbytes:
            raise ValueError(f"ends within its header, after {len(self.data)} bytes")
        self.offset += nbytes
        return taken

    def skip(self, nbytes: int) -> None:
        if nbytes > len(self.data) - self.offset:
            raise ValueError(f"ends within its header, after {len(self.data)} bytes")
        self.offset += nbytes

    def number(self, layout: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return value

    def whole(self, layout: str) -> int:
        return int(self.number(layout))

    def count(self, layout: str, most: int, what: str) -> int:
        count = self.whole(layout)
        if count > most:
            raise ValueError(f"{count} {what}; at most {most} are read")
        return count

    def text(self) -> str:
        return self.take(self.count("<Q", _MAX_TEXT, "bytes of a string")).decode(errors="replace")

    def field(self) -> tuple[str, Value]:
        name, kind = self.text(), GGUFValueType(self.whole("<I"))
        if kind is not GGUFValueType.ARRAY:
            return name, self.text() if kind is GGUFValueType.STRING else self.number(_SCALARS[kind])
        inner, count = GGUFValueType(self.whole("<I")), self.whole("<Q")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]))
            return name, None
        if inner is not GGUFValueType.STRING or count > _MAX_STRINGS:
            raise ValueError(f"field {name}: an array of {count} × {inner.name}")
        if count <= _KEPT:
            return name, [self.text() for _ in range(count)]
        for _ in range(count):
            self.skip(self.whole("<Q"))
        return name, None

    def tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self.text()
        sizes = [self.whole("<Q") for _ in range(self.count("<I", _MAX_DIMS, f"dimensions of {name}"))]
        kind = GGMLQuantizationType(self.whole("<I"))
        return name, kind, tuple(reversed(sizes)), self.whole("<Q")
