"""The pour: reads every weight once, quantizes it once and hands the result to every artifact.

A pool of threads takes blocks of rows in the order of execution, which is that of the artifacts. Each thread reads its
block, quantizes it and packs it for every container; as many others write the results to their places, which the
layouts fixed beforehand, and hash the files as they grow. Reading, computing and writing overlap, and what is in memory
is a few blocks a thread, however large the model is.

With a journal (tundish.journal), blocks that an earlier pour into the same folder has finished are read and hashed
instead, and stay where they are if their bytes have the digest in the journal.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from converters.graph import Graph, Weight
from converters.quantize.block import dequantize, quantize_rows
from converters.quantize.tensor import U8, Tensor
from exporters.base import Layout, Place, Target
from tundish.big_file import BigFileWriter
from tundish.digest import LEAF_ROWS, leaf_digests, matrix_digest
from tundish.disk import disk_errors
from tundish.journal import JOURNAL, Done, Journal
from tundish.publish import is_plain, remove_any

BLOCK_ELEMENTS = 1 << 20  # bounds the memory of a pour; larger than what a block costs in calls, smaller than caches
# Rows of a block are a multiple of this, however wide they are: kernels take rows together (rtn_search.LANES).
BLOCK_ROWS = 64
assert BLOCK_ROWS % LEAF_ROWS == 0
BLOCKS_AHEAD = 3  # blocks a thread that are being packed or are packed and not yet written

Block = tuple[Weight, int, int]  # rows [start, stop) of a weight
Packed = tuple[Done, list[Future[None]]]  # a block's digests, and its writes
Quantize = Callable[[Weight, int, int], Tensor]  # rows [start, stop) of a weight under its scheme
Write = Callable[[Target, Place, int, U8], None]  # of packed rows, the first of which is that row of the weight


@dataclass(frozen=True, slots=True)
class Poured:
    """Digests in hex: of each matrix's canonical values, and SHA-256 of each file of each target, by name.

    `kept` of the `blocks` had been there before.
    """

    matrices: Mapping[str, str]
    files: Mapping[Target, Mapping[str, str]]
    kept: int = 0
    blocks: int = 0


def pour(
    graph: Graph,
    layouts: Mapping[Target, Layout],
    folder: Path,
    advance: Callable[[int], None] = lambda elements: None,
    quantize: Quantize = quantize_rows,
    threads: int = 1,
    journal: Journal | None = None,
) -> Poured:
    """Write every artifact into folder/<target> and return its digests.

    Verification reads the artifacts back and expects the same digests of matrices. `advance` is called with the number
    of elements done. `quantize` gives the same rows whenever it is asked. The first error stops every thread.
    """
    leaves: dict[str, list[bytes]] = {}
    known = journal.blocks if journal else {}
    blocks = kept = 0
    with disk_errors(folder), ExitStack() as stack:
        if journal:
            _remove_strangers(folder, layouts)
        files = {
            (target, name): stack.enter_context(_open(folder / target / name, layout, name, graph, journal is not None))
            for target, layout in layouts.items()
            for name in layout.big
        }
        writers = stack.enter_context(_pool(threads, "write"))
        packers = stack.enter_context(_pool(threads, "pack"))  # at the end, these stop before what they submit to

        def work(block: Block) -> Packed:
            weight, start, stop = block
            found = known.get((weight.name, start, stop))
            if found and _keep(block, found.packed, layouts, files):
                return found, []
            writes: list[Future[None]] = []
            digest = xxhash.xxh3_128()

            def write(target: Target, place: Place, start: int, packed: U8) -> None:
                if journal:
                    digest.update(packed.data)
                offset = place.offset + start * place.row_nbytes
                writes.append(writers.submit(files[target, place.file].write, packed.data, offset))

            digests = pour_block(block, layouts, quantize, write)
            return Done(digest.hexdigest(), digests), writes

        def finish(packed: Future[Packed]) -> Done:
            done, writes = packed.result()
            for write in writes:
                write.result()
            return done

        def submit(block: Block) -> Future[Packed]:
            return packers.submit(work, block)

        for (weight, start, stop), done in _in_order(submit, finish, _blocks(graph, layouts), BLOCKS_AHEAD * threads):
            blocks += 1
            rows = weight.name, start, stop
            if known.get(rows) is done:
                kept += 1
            elif journal:
                journal.add_block(rows, done)
            leaves.setdefault(weight.name, []).append(done.leaves)
            advance((stop - start) * math.prod(weight.shape[1:]))
        for target, layout in layouts.items():
            for name, data in layout.small.items():
                path = folder / target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        sha256 = {
            target: {name: files[target, name].sha256() for name in layout.big}
            | {name: hashlib.sha256(data).hexdigest() for name, data in layout.small.items()}
            for target, layout in layouts.items()
        }
    matrices = {name: matrix_digest(parts) for name, parts in leaves.items() if len(graph.weights[name].shape) > 1}
    return Poured(matrices, sha256, kept, blocks)


def _blocks(graph: Graph, layouts: Mapping[Target, Layout]) -> Iterator[Block]:
    """Every block of every weight in the graph's order: artifacts then grow from start to end, or nearly.

    Disks read forward all the same: a tensor is megabytes, and blocks of one follow one another.
    """
    for weight in graph.weights.values():
        places = (place for layout in layouts.values() for place in layout.places[weight.name])
        for start, stop in row_blocks(weight, places):
            yield weight, start, stop


@contextmanager
def _pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that, at the end or at an error, finish what they began and begin nothing more."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    submit: Callable[[Block], Future[Packed]],
    finish: Callable[[Future[Packed]], Done],
    blocks: Iterable[Block],
    ahead: int,
) -> Iterator[tuple[Block, Done]]:
    """Submit blocks, at most `ahead` of them at a time, and yield what finishing each one returns, in order."""
    submitted: deque[tuple[Block, Future[Packed]]] = deque()
    for block in blocks:
        submitted.append((block, submit(block)))
        if len(submitted) == ahead:
            first, future = submitted.popleft()
            yield first, finish(future)
    for first, future in submitted:
        yield first, finish(future)


def pour_block(block: Block, layouts: Mapping[Target, Layout], quantize: Quantize, write: Write) -> bytes:
    """Read, quantize, pack and write one block; returns the digests of its leaves."""
    weight, start, stop = block
    tensor = quantize(weight, start, stop)
    for target, layout in layouts.items():
        for place in layout.places[weight.name]:
            packed = np.ascontiguousarray(place.pack(tensor)).reshape(-1).view(np.uint8)
            assert packed.nbytes == (stop - start) * place.row_nbytes, (weight.name, place.file, packed.nbytes)
            write(target, place, start, packed)
    return leaf_digests(dequantize(tensor))


def row_blocks(weight: Weight, places: Iterable[Place]) -> Iterator[tuple[int, int]]:
    """[start, stop) of each block of rows: bounded in size, at multiples that every place can pack."""
    multiple = math.lcm(BLOCK_ROWS, *(place.row_multiple for place in places))
    rows = weight.shape[0]
    step = max(1, BLOCK_ELEMENTS // (math.prod(weight.shape[1:]) * multiple)) * multiple
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _keep(
    block: Block, digest: str, layouts: Mapping[Target, Layout], files: Mapping[tuple[Target, str], BigFileWriter]
) -> bool:
    """Keep a block that is in its places with that digest; False, and nothing is kept, if something else is there."""
    weight, start, stop = block
    found = []
    for target, layout in layouts.items():
        for place in layout.places[weight.name]:
            file, offset = files[target, place.file], place.offset + start * place.row_nbytes
            found.append((file, file.read((stop - start) * place.row_nbytes, offset), offset))
    there = xxhash.xxh3_128()
    for _, data, _ in found:
        there.update(data)
    if there.hexdigest() != digest:
        return False
    for file, data, offset in found:
        file.keep(data, offset)
    return True


def _remove_strangers(folder: Path, layouts: Mapping[Target, Layout]) -> None:
    """Leave nothing but big files and the folders that they are in, each with the permissions of a new one.

    Links above all are not to be written into; small files are written anew in any case.
    """
    big = {folder / target / name for target, layout in layouts.items() for name in layout.big}
    folders = {parent for path in big for parent in path.relative_to(folder).parents}
    folder.chmod(0o755)  # as tundish.publish makes it
    modes = _modes_of_new(folder)

    def look_into(parent: Path) -> None:
        for path in list(parent.iterdir()):
            is_folder = stat.S_ISDIR(path.lstat().st_mode)
            if is_folder and path.relative_to(folder) in folders:
                path.chmod(modes[0])
                look_into(path)
            elif path in big and is_plain(path):
                path.chmod(modes[1])
            elif path != folder / JOURNAL:
                remove_any(path)

    look_into(folder)


def _modes_of_new(folder: Path) -> tuple[int, int]:
    """Permissions that a new folder in this one has, and a big file: the process's mask is not to be asked for."""
    scratch = Path(tempfile.mkdtemp(dir=folder))
    try:
        (scratch / "folder").mkdir()
        BigFileWriter(scratch / "file", 0).close()
        folder_mode, file_mode = ((scratch / name).stat().st_mode for name in ("folder", "file"))
    finally:
        shutil.rmtree(scratch)
    return stat.S_IMODE(folder_mode), stat.S_IMODE(file_mode)


@contextmanager
def _open(path: Path, layout: Layout, name: str, graph: Graph, again: bool) -> Iterator[BigFileWriter]:
    """A file with its space reserved and the fixed parts written: a new one, or what an earlier pour left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = BigFileWriter(path, layout.big[name].nbytes, again and path.exists())
    try:
        for start, stop in _gaps(layout, name, graph):
            file.leave(stop - start, start)
        for offset, data in layout.big[name].fixed:
            file.write(memoryview(data), offset)
        yield file
    finally:
        file.close()


def _gaps(layout: Layout, name: str, graph: Graph) -> Iterator[tuple[int, int]]:
    """[start, stop) of what no part and no weight fills."""
    filled = [(offset, len(data)) for offset, data in layout.big[name].fixed]
    filled += [
        (place.offset, graph.weights[weight].shape[0] * place.row_nbytes)
        for weight, places in layout.places.items()
        for place in places
        if place.file == name
    ]
    end = 0
    for offset, nbytes in sorted(filled):
        assert offset >= end, (name, "overlaps at", offset)
        if offset > end:
            yield end, offset
        end = offset + nbytes
    if layout.big[name].nbytes > end:
        yield end, layout.big[name].nbytes
