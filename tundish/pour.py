"""The pour: reads every weight once, quantizes it once and hands the result to every artifact."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from converters.graph import Graph, Weight
from converters.quantize.block import dequantize, quantize_rows
from converters.quantize.tensor import F32
from exporters.base import Layout, Place, Target
from tundish.digest import MatrixDigest
from tundish.disk import disk_errors

BLOCK_ELEMENTS = 4 * 1024 * 1024  # bounds the memory of a pour: a float32 block of 16 MiB and its quantized forms


def pour(
    graph: Graph,
    layouts: Mapping[Target, Layout],
    folder: Path,
    advance: Callable[[int], None] = lambda elements: None,
    importance: Mapping[str, F32] | None = None,
) -> dict[str, str]:
    """Write every artifact into folder/<target> and return the digest of each matrix's canonical values.

    Verification reads the artifacts back and expects the same digests. `advance` is called with the number of elements
    done. `importance` is f32[in] by weight name, where the quantizer shall know it.
    """
    digests: dict[str, str] = {}
    with disk_errors(folder), ExitStack() as stack:
        files = {
            (target, name): stack.enter_context(_create(folder / target / name, big.nbytes, big.fixed))
            for target, layout in layouts.items()
            for name, big in layout.big.items()
        }
        for weight in sorted(graph.weights.values(), key=_file_order):
            places = [
                (files[target, place.file], place)
                for target, layout in layouts.items()
                for place in layout.places[weight.name]
            ]
            digest = _pour_weight(weight, places, (importance or {}).get(weight.name), advance)
            if len(weight.shape) > 1:
                digests[weight.name] = digest
        for target, layout in layouts.items():
            for name, data in layout.small.items():
                path = folder / target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    return digests


def _pour_weight(
    weight: Weight, places: list[tuple[int, Place]], importance: F32 | None, advance: Callable[[int], None]
) -> str:
    digest = MatrixDigest()
    for start, stop in row_blocks(weight, (place for _, place in places)):
        tensor = quantize_rows(weight, start, stop, importance)
        digest.update(dequantize(tensor))
        for file, place in places:
            packed = np.ascontiguousarray(place.pack(tensor)).reshape(-1).view(np.uint8)
            assert packed.nbytes == (stop - start) * place.row_nbytes, (weight.name, place.file, packed.nbytes)
            _write_at(file, packed.data, place.offset + start * place.row_nbytes)
        advance((stop - start) * math.prod(weight.shape[1:]))
    return digest.hexdigest()


def row_blocks(weight: Weight, places: Iterable[Place]) -> Iterator[tuple[int, int]]:
    """[start, stop) of each block of rows: bounded in size, at multiples that every place can pack."""
    multiple = math.lcm(*(place.row_multiple for place in places))
    rows = weight.shape[0]
    step = max(1, BLOCK_ELEMENTS // (math.prod(weight.shape[1:]) * multiple)) * multiple
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _file_order(weight: Weight) -> tuple[str, int]:
    """Where the weight lies in the checkpoint, so that disks read forward."""
    return weight.source.location


@contextmanager
def _create(path: Path, nbytes: int, fixed: Iterable[tuple[int, bytes]]) -> Iterator[int]:
    """A new file of exactly nbytes, its space reserved, with the fixed parts written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        if nbytes:
            os.posix_fallocate(file, 0, nbytes)
        for offset, data in fixed:
            _write_at(file, memoryview(data), offset)
        yield file
    finally:
        os.close(file)


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
