"""llama.cpp's importance matrix files: the mean square of each input column of each matrix, measured on text.

Both generations of tools/imatrix/imatrix.cpp, and what tools/quantize/quantize.cpp makes of them:

    the old one, .dat: little-endian, i32 and f32 throughout
        entries, then for each: length of name, name, calls, width, means * calls [width]
        then, in files since May 2024: chunks, length of the data set's name, that name

    the present one: a GGUF file with general.type "imatrix", imatrix.datasets, imatrix.chunk_count and
        imatrix.chunk_size, and for each matrix <name>.in_sum2 [n, width], sums of squares, and <name>.counts [n, 1],
        tokens; n is 1 but for experts. Other tensors, such as <name>.in_sum, are ignored.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, Keys

from converters.errors import TundishError, UsageError
from converters.gguf_file import GgufFile, read_gguf
from converters.json_file import regular_size
from converters.quantize.tensor import F32

SUMS, COUNTS = ".in_sum2", ".counts"
_TYPE = "imatrix"
_I32 = struct.Struct("<i")
_MAX_NBYTES = 1 << 28  # a model of 70 B has one of 25 MB


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """`means`: mean squares f32[in] by GGUF tensor name; of n experts f32[n * in].

    `chunks` texts of `chunk_size` tokens were read; the old files state no size (None).
    """

    means: Mapping[str, F32]
    chunks: int
    chunk_size: int | None
    datasets: tuple[str, ...]


def read_imatrix(path: Path) -> ImportanceMatrix:
    """The file of either generation. UsageError if it is neither, is cut off, or holds what is no mean square."""
    try:
        size = regular_size(path)
        if size > _MAX_NBYTES:
            raise ValueError(f"{size:,} bytes; at most {_MAX_NBYTES:,} are read")
        with path.open("rb") as file:
            magic = file.read(4)
        matrix = _read_gguf(path) if magic == b"GGUF" else _read_dat(path.read_bytes())
    except TundishError:
        raise
    except OSError as error:
        found = error.strerror or str(error)
        raise UsageError("cannot read the importance matrix", where=str(path), found=found) from error
    except (ValueError, struct.error) as error:
        raise UsageError(
            "not an importance matrix of llama.cpp, or a damaged one",
            where=str(path),
            found=next(iter(str(error).splitlines()), "") or type(error).__name__,
            mend="Make it anew with llama-imatrix.",
        ) from error
    for name, means in matrix.means.items():
        if not np.isfinite(means).all() or (means < 0).any():
            raise UsageError(
                "the importance matrix holds what is no mean square",
                where=f"{path}: {name}",
                found="negative numbers" if np.isfinite(means).all() else "NaN or Inf",
                mend="Make it anew with llama-imatrix.",
            )
    return matrix


def write_imatrix(
    path: Path,
    means: Mapping[str, F32],
    *,
    chunks: int,
    chunk_size: int,
    datasets: Sequence[str] = (),
    legacy: bool = False,
) -> None:
    """Write mean squares f32[in] by GGUF tensor name, as measured on `chunks` texts of `chunk_size` tokens.

    A GGUF file, or with `legacy` a .dat, which keeps the last data set's name only.
    """
    if legacy:
        path.write_bytes(_dat(means, chunks, datasets))
    else:
        _write_gguf(path, means, chunks, chunk_size, datasets)


def _read_dat(data: bytes) -> ImportanceMatrix:
    stream = BytesIO(data)

    def take(nbytes: int) -> bytes:
        taken = stream.read(nbytes) if 0 <= nbytes <= len(data) else b""
        if len(taken) != nbytes:
            raise ValueError(f"ends within an entry, after {len(data):,} bytes")
        return taken

    def integer() -> int:
        value: int = _I32.unpack(take(4))[0]
        return value

    means: dict[str, F32] = {}
    for _ in range(_positive(integer(), "entries")):
        name = take(integer()).decode()
        calls, width = integer(), integer()
        sums = np.frombuffer(take(4 * _positive(width, f"values of {name}")), "<f4").astype(np.float32)
        means[name] = sums / np.float32(calls) if calls > 0 else sums
    if stream.tell() == len(data):
        return ImportanceMatrix(means, 0, None, ())
    chunks, dataset = integer(), take(integer()).decode(errors="replace")  # a path, in its system's encoding
    return ImportanceMatrix(means, chunks, None, (dataset,) if dataset else ())


def _positive(count: int, what: str) -> int:
    if count < 1:
        raise ValueError(f"{count} {what}")
    return count


def _dat(means: Mapping[str, F32], chunks: int, datasets: Sequence[str]) -> bytes:
    parts = [_I32.pack(len(means))]
    for name, values in sorted(means.items()):
        calls = max(chunks, 1)
        sums = (values * np.float32(calls)).astype("<f4")
        parts += [_text(name), _I32.pack(calls), _I32.pack(sums.size), sums.tobytes()]
    return b"".join([*parts, _I32.pack(chunks), _text(datasets[-1] if datasets else "")])


def _text(text: str) -> bytes:
    data = text.encode()
    return _I32.pack(len(data)) + data


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = read_gguf(path)
    kind = file.fields.get(Keys.General.TYPE)
    if kind != _TYPE:
        raise UsageError(
            "a GGUF file that is no importance matrix",
            where=str(path),
            expected=f"{Keys.General.TYPE} {_TYPE}",
            found="no type" if kind is None else str(kind),
        )
    names = {name.removesuffix(suffix) for name in file.tensors for suffix in (SUMS, COUNTS) if name.endswith(suffix)}
    means: dict[str, F32] = {}
    for name in sorted(names):
        absent = [name + suffix for suffix in (SUMS, COUNTS) if name + suffix not in file.tensors]
        if absent:
            raise ValueError(f"has no {absent[0]}")
        counts = _numbers(file, name + COUNTS).reshape(-1, 1)
        sums = _numbers(file, name + SUMS).reshape(_positive(len(counts), f"counts of {name}"), -1)
        # What never got any input counts 1 in each column, as for llama-quantize.
        means[name] = np.where(counts > 0, sums / np.where(counts > 0, counts, 1), np.float32(1)).reshape(-1)
    _positive(len(means), "entries")
    chunks, size = (file.fields.get(key) for key in (Keys.IMatrix.CHUNK_COUNT, Keys.IMatrix.CHUNK_SIZE))
    datasets = file.fields.get(Keys.IMatrix.DATASETS)
    named = tuple(datasets) if isinstance(datasets, list) else ()
    return ImportanceMatrix(means, _whole(chunks) or 0, _whole(size), named)


def _numbers(file: GgufFile, name: str) -> F32:
    """A tensor as llama-imatrix writes them."""
    tensor = file.tensors[name]
    if tensor.type is not GGMLQuantizationType.F32 or len(tensor.shape) not in (1, 2):
        raise ValueError(f"{name} is {tensor.type.name} {list(tensor.shape)}, not F32 [n, width]")
    return file.values(name)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _write_gguf(path: Path, means: Mapping[str, F32], chunks: int, chunk_size: int, datasets: Sequence[str]) -> None:
    writer = GGUFWriter(path, arch="")  # which leaves the key out: it is no model
    writer.add_type(_TYPE)
    # llama-quantize takes the first without a look at how many there are.
    writer.add_key_value(Keys.IMatrix.DATASETS, list(datasets) or [""], GGUFValueType.ARRAY, GGUFValueType.STRING)
    writer.add_uint32(Keys.IMatrix.CHUNK_COUNT, chunks)
    writer.add_uint32(Keys.IMatrix.CHUNK_SIZE, chunk_size)
    tokens = np.float32(chunks * chunk_size)
    for name, values in sorted(means.items()):
        writer.add_tensor(name + SUMS, (values * tokens).astype(np.float32).reshape(1, -1))
        writer.add_tensor(name + COUNTS, np.full((1, 1), tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
