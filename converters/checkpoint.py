"""Safetensors checkpoints, read lazily: shapes and dtypes are known before any weight byte is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from converters.errors import ModelError
from converters.json_file import MAX_NBYTES, Json, inside, parse_json, read_json, regular_size
from converters.other_formats import refuse_other_formats, unsupported_type
from converters.quantize.tensor import FloatArray

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_DIMS = 8  # far more than any weight has; a header must not make us multiply a million sizes
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Safetensors dtype names of the floats that language models are published in.
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
COMPARED = 1 << 22  # numbers at a time


class TensorSource(Protocol):
    """Rows of a float tensor, wherever they come from."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def location(self) -> tuple[str, int]:
        """File and byte offset of the first row: sorting by it reads a disk forward."""
        ...

    def read(self, start: int, stop: int) -> FloatArray:
        """[stop - start, ...]: rows of the first axis in the stored dtype."""
        ...


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor in a safetensors file. `offset` counts bytes from the start of the file.

    float64 is read as float32, in which models compute.
    """

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    stored: np.dtype

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32) if self.stored == np.float64 else self.stored

    @property
    def location(self) -> tuple[str, int]:
        return str(self.path), self.offset

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.stored.itemsize

    def read(self, start: int, stop: int) -> FloatArray:
        row = math.prod(self.shape[1:])
        count = (stop - start) * row
        try:
            data = np.fromfile(self.path, self.stored, count, offset=self.offset + start * row * self.stored.itemsize)
        except OSError as error:
            where = f"{self.path.name}, tensor {self.name}"
            raise ModelError("checkpoint file cannot be read", where=where, found=str(error)) from error
        if data.size != count:
            raise ModelError(
                "checkpoint file is shorter than its header says",
                where=f"{self.path.name}, tensor {self.name}",
                expected=f"{count} values",
                found=f"{data.size}",
                mend="Download the file again.",
            )
        with np.errstate(over="ignore"):  # what is too large is infinite, and refused as such
            return data.reshape(stop - start, *self.shape[1:]).astype(self.dtype, copy=False)


@dataclass(frozen=True, slots=True)
class RowView:
    """Rows [start, stop) of another source: how one part of a fused projection is addressed."""

    base: TensorSource
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stop - self.start, *self.base.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    @property
    def location(self) -> tuple[str, int]:
        path, offset = self.base.location
        return path, offset + self.start * math.prod(self.base.shape[1:]) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> FloatArray:
        return self.base.read(self.start + start, self.start + stop)


def same_numbers(one: TensorSource, other: TensorSource) -> bool:
    """Whether two tensors hold the same numbers; reads them as far as they do. NaN is like no number."""
    if one.shape != other.shape:
        return False
    step = max(1, COMPARED // max(1, math.prod(one.shape[1:])))
    for start in range(0, one.shape[0], step):
        stop = min(start + step, one.shape[0])
        a, b = (each.read(start, stop).astype(np.float32, copy=False) for each in (one, other))
        if not np.array_equal(a, b):
            return False
    return True


def open_checkpoint(folder: Path) -> Mapping[str, LazyTensor]:
    """Every tensor of a checkpoint folder by name, from headers alone; ModelError if anything in them is off.

    model.safetensors is taken if it exists, otherwise the shards that the index names: the order of transformers.
    Other safetensors files beside them (Mistral ships the weights twice) are not looked at.
    """
    refuse_other_formats(folder)
    if (folder / SINGLE).exists():
        return read_safetensors_header(inside(folder, SINGLE))
    if not (folder / INDEX).exists():
        raise _no_weights(folder)
    weight_map = _weight_map(folder)
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in read_safetensors_header(inside(folder, shard)).items():
            if name in tensors:
                found = f"{tensors[name].path.name} and {shard}"
                raise ModelError("tensor stored twice", where=name, expected="one shard", found=found)
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path != folder / shard:
            raise ModelError(
                "index and shards disagree",
                where=f"{INDEX}, tensor {name}",
                expected=f"it in {shard}",
                found=f"it in {tensors[name].path.name}" if name in tensors else "it nowhere",
                mend="Download the index and the shards of one revision.",
            )
    return tensors


def read_safetensors_header(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file. Layout: u64 header length, JSON header, data (safetensors format description).

    ModelError if the file is cut off, a tensor's bytes do not fit its shape and type, lie outside of the file, overlap
    or leave holes.
    """
    try:
        size = regular_size(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or (length <= MAX_NBYTES and size < 8 + length):
                raise _cut(path, f"at least {8 + length if size >= 8 else 8} bytes", size)
            if length > MAX_NBYTES:
                raise ModelError(
                    "safetensors header cannot be that long",
                    where=path.name,
                    expected=f"at most {MAX_NBYTES} bytes",
                    found=str(length),
                    mend="The file is damaged or no safetensors file: download it again.",
                )
            header = parse_json(file.read(length), f"header of {path.name}")
    except OSError as error:
        where = str(path)
        mend = "Download the checkpoint again."
        raise ModelError("checkpoint file missing or unreadable", where=where, found=str(error), mend=mend) from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        stored = entry.get("dtype") if isinstance(entry, dict) else None
        if isinstance(stored, str) and stored not in DTYPES:
            shapes = {each: _integers(of.get("shape")) or () for each, of in header.items() if isinstance(of, dict)}
            raise unsupported_type(f"{path.name}, tensor {name}", stored, DTYPES, shapes)
    tensors = {name: _lazy_tensor(name, entry, path, 8 + length) for name, entry in header.items()}
    _check_coverage(path, tensors, 8 + length, size)
    return tensors


def _lazy_tensor(name: str, entry: Json, path: Path, data_start: int) -> LazyTensor:
    where = f"{path.name}, tensor {name}"
    entry = entry if isinstance(entry, dict) else {}
    shape, offsets = _integers(entry.get("shape")), _integers(entry.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        expected = f"dtype, shape (at most {MAX_DIMS} sizes) and data_offsets"
        raise ModelError("malformed safetensors header", where=where, expected=expected)
    stored = entry.get("dtype")
    if not isinstance(stored, str):
        expected = f"a dtype, such as {', '.join(DTYPES)}"
        raise ModelError("malformed safetensors header", where=where, expected=expected, found=str(stored))
    nbytes, begin, end = math.prod(shape) * DTYPES[stored].itemsize, *offsets
    if end - begin != nbytes:
        expected = f"{nbytes} bytes for {stored}{list(shape)}"
        raise ModelError("tensor bytes do not fit its shape", where=where, expected=expected, found=f"{end - begin}")
    return LazyTensor(name, path, data_start + begin, shape, DTYPES[stored])


def _integers(value: Json) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        return None
    result = tuple(each for each in value if isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 2**63)
    return result if len(result) == len(value) else None


def _check_coverage(path: Path, tensors: Mapping[str, LazyTensor], data_start: int, size: int) -> None:
    """The format wants the tensors to fill the file, one after the other."""
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda each: (each.offset, each.nbytes)):
        if tensor.offset != position:
            raise ModelError(
                "tensors overlap or leave a hole",
                where=f"{path.name}, tensor {tensor.name}",
                expected=f"its data at byte {position}",
                found=f"{tensor.offset}",
                mend="Download the file again.",
            )
        position += tensor.nbytes
    if size < position:
        raise _cut(path, f"{position} bytes, as its header says", size)
    if size > position:
        expected = f"{position} bytes, as its header says"
        raise ModelError("checkpoint file is too long", where=path.name, expected=expected, found=str(size))


def _cut(path: Path, expected: str, size: int) -> ModelError:
    return ModelError(
        "checkpoint file is cut off",
        where=path.name,
        expected=expected,
        found=str(size),
        mend="Download the file again.",
    )


def _weight_map(folder: Path) -> dict[str, str]:
    raw = read_json(inside(folder, INDEX)).get("weight_map")
    if not isinstance(raw, dict) or not raw or not all(isinstance(shard, str) for shard in raw.values()):
        expected = '"weight_map" from tensor names to file names'
        raise ModelError("malformed index", where=INDEX, expected=expected, found=type(raw).__name__)
    return {name: str(shard) for name, shard in raw.items()}


def _no_weights(folder: Path) -> ModelError:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(PICKLES)]
    loose = [name for name in names if name.endswith(".safetensors")]
    expected = f"{SINGLE} or {INDEX}"
    if loose:
        mend = f"Download {INDEX} too, or rename the single file to {SINGLE}."
        what = "weights without their index"
        return ModelError(what, where=str(folder), expected=expected, found=loose[0], mend=mend)
    if pickles:
        return ModelError(
            "checkpoint has pickled weights only",
            where=str(folder),
            expected=expected,
            found=pickles[0],
            mend="Pickles can run code, so tundish does not read them: save the model with "
            "transformers' save_pretrained(..., safe_serialization=True) first.",
        )
    return ModelError("no weights in the checkpoint folder", where=str(folder), expected=expected, found="neither")
