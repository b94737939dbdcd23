"""How long a build would take here, from about a second of the very work that it would do.

A block of the model's own weights goes through the pour's block function for each kind of work, pieces of the
checkpoint are read, some megabytes are hashed and some written to files on the disk of --out, which are then removed.
As many threads as the build would have do each of these at the same time, so the figures hold what threads take from
one another.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil

from converters.arrays import products
from converters.checkpoint import TensorSource
from converters.graph import Graph, Weight
from converters.interpret import interpret
from converters.ops import Linear
from converters.quantize.awq import AWQ_ROWS, awq_scales
from converters.quantize.block import quantize_rows
from converters.quantize.scheme import SCHEMES
from converters.quantize.sequential import fittable
from converters.quantize.tensor import U8
from exporters.base import Layout, Place, Target
from tundish.big_file import BigFileWriter
from tundish.calibrate import NOTHING, Reading
from tundish.disk import disk_errors
from tundish.pour import BLOCK_ELEMENTS, BLOCK_ROWS, pour_block, row_blocks

_COMPUTE_SECONDS = 0.6  # for all kinds of work together, if two blocks of each take no longer
_MEASURED_TOKENS = 1024
_FIT_PASSES = 6  # products of a matrix and its Hessian while it is fitted
_STEP_PASSES = 2  # products of a matrix and its Hessian that a step of a refinement takes as long as
_PIECES = 16  # of the checkpoint, of BLOCK_ELEMENTS numbers
_WRITE_BYTES = 64 << 20
_WRITE_CHUNK = 1 << 20
_HASH_BYTES = 8 << 20
# Linux lets written pages fill that much of the available memory before a writer waits for the disk (vm.dirty_ratio).
_WRITTEN_BEHIND = 0.2

Together = Callable[[Callable[[], object]], float]
"""Has every thread do the work once; the seconds until all are done."""


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of a build's parts, verification aside.

    `prepare` is what comes before the first weight: tokenizer, graph, layouts. `source` is SHA-256 of the checkpoint,
    which a thread of its own takes from the start, `digest` that of what is written. `threads` share the processors.
    """

    threads: int
    prepare: float
    calibrate: float
    read: float
    quantize: float
    write: float
    source: float
    digest: float

    @property
    def total(self) -> float:
        """Of the whole build. A thread reads and quantizes its block in turn; meanwhile others write and hash."""
        source = max(self.source - self.prepare, 0)  # until then only one thread has something to do
        pour = max(self.read + self.quantize + (source + self.digest) / self.threads, self.write, source)
        return self.prepare + self.calibrate + pour

    def parts(self) -> dict[str, float]:
        """Every part by name, the total last."""
        parts = {**asdict(self), "total": self.total}
        del parts["threads"]
        return parts


@dataclass(frozen=True, slots=True)
class Kind:
    """Matrices that are the same work: of one scheme and packed alike. The largest, and how many numbers are in all."""

    weight: Weight
    elements: int


def kinds_of_work(graph: Graph, layouts: Mapping[Target, Layout]) -> list[Kind]:
    """The kinds of a pour, by the numbers in them. Vectors are left out: they are next to no work."""
    found: dict[object, list[Weight]] = {}
    for weight in graph.weights.values():
        if len(weight.shape) > 1:
            packed = [
                (target, place.row_nbytes / weight.shape[-1], place.row_multiple)
                for target, layout in layouts.items()
                for place in layout.places[weight.name]
            ]
            found.setdefault((weight.scheme, *packed), []).append(weight)
    kinds = [Kind(max(group, key=_elements), sum(map(_elements, group))) for group in found.values()]
    return sorted(kinds, key=lambda kind: kind.elements, reverse=True)


def warm_up(graph: Graph, layouts: Mapping[Target, Layout], calibrated: bool) -> None:
    """Load the kernels of a pour, or compile them, by pouring a few rows of each kind into nothing.

    `calibrated` is whether the quantizer will know importances. ModelError as in a pour.
    """
    for kind in kinds_of_work(graph, layouts):
        first = _first_block(kind.weight, layouts)
        multiple = math.lcm(BLOCK_ROWS, *(place.row_multiple for place in _places(kind.weight, layouts)))
        _pour(kind.weight, min(multiple, first), layouts, calibrated)


def estimate_time(
    graph: Graph,
    layouts: Mapping[Target, Layout],
    sources: Iterable[Path],
    folder: Path,
    threads: int,
    read: Reading = NOTHING,
    prepare: float = 0.0,
    calibrated: bool = False,
) -> Time:
    """Measure, and multiply. The kernels have to be warm.

    `sources` are the checkpoint's files, `folder` lies on the disk of --out; nothing stays in it. `read`: what the
    model reads for calibration. `prepare`: the seconds it took to get that far. `calibrated`: whether the quantizer
    will know importances.
    ResourceError if nothing can be written.
    """
    outputs = [file.nbytes for layout in layouts.values() for file in layout.big.values()]
    inputs = [path.stat().st_size for path in sources]
    kinds = kinds_of_work(graph, layouts)
    with ThreadPoolExecutor(threads, thread_name_prefix="estimate") as pool:

        def together(work: Callable[[], object]) -> float:
            start = perf_counter()
            for future in [pool.submit(work) for _ in range(threads)]:
                future.result()
            return perf_counter() - start

        reading = _read_seconds(graph, threads, together)  # first: what is measured next brings rows into memory
        patience = _COMPUTE_SECONDS / len(kinds)
        quantize = sum(_quantize_seconds(kind, layouts, calibrated, patience, together) for kind in kinds)
        with disk_errors(folder):
            written, on_disk = _scratch_speeds(folder, threads, together)
        digest = _digest_speed(together)
    calibrate = _calibration_seconds(graph, read) if read.tokens else 0.0
    return Time(
        threads,
        prepare,
        calibrate,
        reading,
        quantize / threads,
        _write_seconds(sum(outputs), written, on_disk),
        sum(inputs) * digest + _reread_seconds(sum(inputs), reading, threads),
        sum(outputs) * digest,
    )


def _elements(weight: Weight) -> int:
    return math.prod(weight.shape)


def _places(weight: Weight, layouts: Mapping[Target, Layout]) -> list[Place]:
    return [place for layout in layouts.values() for place in layout.places[weight.name]]


def _first_block(weight: Weight, layouts: Mapping[Target, Layout]) -> int:
    """Rows of a pour's first block, and of all but the last."""
    return next(iter(row_blocks(weight, _places(weight, layouts))))[1]


def _pour(weight: Weight, rows: int, layouts: Mapping[Target, Layout], calibrated: bool) -> None:
    """The first rows, poured into nothing."""
    importance = np.ones(weight.shape[-1], np.float32) if calibrated else None
    pour_block((weight, 0, rows), layouts, partial(quantize_rows, importance=importance), _write_nowhere)


def _write_nowhere(target: Target, place: Place, start: int, packed: U8) -> None:
    pass


def _quantize_seconds(
    kind: Kind, layouts: Mapping[Target, Layout], calibrated: bool, patience: float, together: Together
) -> float:
    """Of all matrices of a kind, while every thread does the same: quantizing and packing, reading left out."""
    source, rows = kind.weight.source, _first_block(kind.weight, layouts)
    source.read(0, rows)  # into memory, where the pours below find them: a read from the disk would outlast those
    read, spent = list[float](), list[float]()
    while not spent or sum(spent) < patience:
        read.append(together(lambda: source.read(0, rows)))
        spent.append(together(lambda: _pour(kind.weight, rows, layouts, calibrated)))
    blocks = kind.elements / (rows * math.prod(kind.weight.shape[1:]))
    return max(min(spent) - min(read), 0.0) * blocks


def _read_seconds(graph: Graph, threads: int, together: Together) -> float:
    """Of the whole checkpoint, from pieces of large matrices anywhere in it: an earlier plan may have read others."""
    matrices = sorted((weight for weight in graph.weights.values() if len(weight.shape) > 1), key=_elements)
    sources = [weight.source for weight in matrices[len(matrices) // 2 :]]
    each = -(-_PIECES // threads)
    pieces = [_somewhere(sources) for _ in range(each * threads)]
    left = iter(pieces)
    spent = together(lambda: [source.read(start, stop) for source, start, stop in itertools.islice(left, each)])
    nbytes = sum((stop - start) * _row_nbytes(source) for source, start, stop in pieces)
    in_all = sum(weight.source.shape[0] * _row_nbytes(weight.source) for weight in graph.weights.values())
    return spent * in_all / nbytes


def _somewhere(sources: Sequence[TensorSource]) -> tuple[TensorSource, int, int]:
    """A source and [start, stop) of BLOCK_ELEMENTS numbers in whole rows, or of all rows if they have fewer."""
    random = np.random.default_rng()
    source = sources[int(random.integers(len(sources)))]
    rows = min(source.shape[0], max(1, BLOCK_ELEMENTS // math.prod(source.shape[1:])))
    start = int(random.integers(source.shape[0] - rows + 1))
    return source, start, start + rows


def _row_nbytes(source: TensorSource) -> int:
    return math.prod(source.shape[1:]) * source.dtype.itemsize


def _scratch_speeds(folder: Path, threads: int, together: Together) -> tuple[float, float]:
    """Seconds a byte of writing as a pour does, and of writing until it is on the disk."""
    data = memoryview(np.random.default_rng(0).bytes(_WRITE_CHUNK))  # no zeros: some file systems do not write them
    room = shutil.disk_usage(folder).free // 2  # a build that fits does so by little, maybe
    nbytes = max(1, min(_WRITE_BYTES, room) // (threads * _WRITE_CHUNK)) * _WRITE_CHUNK  # a thread
    with tempfile.TemporaryDirectory(prefix=".tundish-plan-", dir=folder) as scratch:
        paths = [Path(scratch) / str(number) for number in range(threads)]
        unwritten = iter(paths)

        def write() -> None:
            writer = BigFileWriter(next(unwritten), nbytes)
            try:
                for offset in range(0, nbytes, _WRITE_CHUNK):
                    writer.write(data, offset)
            finally:
                writer.close()

        start = perf_counter()
        written = together(write)
        for path in paths:
            with path.open("rb") as file:
                os.fsync(file)
        on_disk = perf_counter() - start
    return written / (nbytes * threads), on_disk / (nbytes * threads)


def _write_seconds(nbytes: int, written: float, on_disk: float) -> float:
    """Of writing so many bytes. A writer waits for the disk only when memory takes no more of what is to go there."""
    behind = psutil.virtual_memory().available * _WRITTEN_BEHIND
    seconds: float = max(nbytes * written, (nbytes - behind) * on_disk)
    return seconds


def _reread_seconds(nbytes: int, read: float, threads: int) -> float:
    """Of the checkpoint, by one thread more: nothing where the page cache can hold all of it."""
    return read * threads if nbytes > psutil.virtual_memory().available else 0.0


def _digest_speed(together: Together) -> float:
    """Seconds a byte of hashing what is in memory."""
    data = bytes(_HASH_BYTES)
    return together(lambda: hashlib.sha256(data).digest()) / _HASH_BYTES


def _calibration_seconds(graph: Graph, read: Reading) -> float:
    """Of the interpreter's reading: one sequence in its first block, as often as there are blocks and sequences. The
    head is left out there too. Where layers are fitted two models read, and one before where columns are scaled."""
    token_ids = np.random.default_rng(0).integers(0, graph.config.vocab_size, (1, read.length))
    last = [node.name for node in graph.nodes if node.layer == 0][-1]
    start = perf_counter()
    interpret(graph, token_ids, stop_at=last)
    seconds = (perf_counter() - start) * graph.config.num_layers * read.sequences
    seconds *= 1 + read.fitted + read.scaled
    seconds += _fit_seconds(graph, read) if read.fitted else 0.0
    return seconds + (_scale_seconds(graph) if read.scaled else 0.0)


def _fit_seconds(graph: Graph, read: Reading) -> float:
    """Of second moments, of fitting to them and refining that: products of matrices, from one such product."""
    linear = [node.op.weights for node in graph.nodes if isinstance(node.op, Linear)]
    fitted = {weight.name: weight for weight in fittable(graph)}
    widths = [graph.weights[names[0]].shape[1] for names in linear if not fitted.keys().isdisjoint(names)]
    sample = np.ones((_MEASURED_TOKENS, min(widths)), np.float32)
    spent = []
    for _ in range(3):
        start = perf_counter()
        products().product(sample.T, sample)
        spent.append(perf_counter() - start)
    flops = sum(2.0 * read.tokens * width**2 for width in widths)  # of inputs with themselves, and the floats'
    for weight in fitted.values():
        passes = _FIT_PASSES + (_STEP_PASSES * read.steps if weight.scheme.bits < 8 else 0)
        flops += passes * _elements(weight) * weight.shape[1]
    return min(spent) * flops / (sample.size * sample.shape[1])


def _scale_seconds(graph: Graph) -> float:
    """Of the search for factors of columns, from one such search: what it costs grows with the square of the width."""
    widths = [graph.weights[node.op.weights[0]].shape[1] for node in graph.nodes if isinstance(node.op, Linear)][:-1]
    width = min(widths)
    rows = np.random.default_rng(0).standard_normal((AWQ_ROWS, width), np.float32)
    moments = rows.T @ rows
    start = perf_counter()
    awq_scales([rows], moments, SCHEMES["int4_g32"])
    return (perf_counter() - start) * sum((each / width) ** 2 for each in widths)
