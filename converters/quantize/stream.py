"""What a model computes on all sequences of a text at once, node by node, in no more memory than is stated.

Values lie in memory as long as those of a store fit its room, and past it in nameless files, which end with the
process. Files are read and written, not mapped: what is read of them is the system's cache and not this process's
memory, and a full disk is an OSError. Nodes and products take a value piece by piece, pieces of the same size wherever
it lies, so that results do not depend on the room.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Self

import numpy as np

from converters.graph import Node
from converters.ops import OPS, Embedding, Linear, Rows

ROOM = 256 << 20  # bytes of values in memory, of all streams of a store together
COMPUTED = 1 << 25  # numbers of a value that are computed at once
MULTIPLIED = 1 << 26  # numbers of a value that one product takes: above it a sum of products, rounded otherwise


class Store:
    """Memory for `room` bytes of values, and for others files in `folder`, or where the system has temporary ones."""

    def __init__(self, folder: Path | None = None, room: int = ROOM) -> None:
        self.folder, self.room = folder, room

    def new(self, shape: tuple[int, ...], dtype: np.dtype[np.generic] | type[np.generic] = np.float32) -> Value:
        """A value to be written. OSError if no file can be made."""
        kind = np.dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        if nbytes > self.room:
            return Value(self, shape, kind, tempfile.TemporaryFile(dir=self.folder, buffering=0))
        return Value(self, shape, kind, np.empty(shape, kind))

    def put(self, array: np.ndarray) -> Value:
        """A value that is the array, which must not be changed any more."""
        if array.nbytes <= self.room:
            return Value(self, array.shape, array.dtype, array)
        value = self.new(array.shape, array.dtype)
        value.write(0, array)
        return value


class Value:
    """An array [sequences, ...] in a store, of which sequences are read and written. OSError as its file has it."""

    __slots__ = ("_held", "_store", "dtype", "shape")

    def __init__(
        self, store: Store, shape: tuple[int, ...], dtype: np.dtype[np.generic], held: np.ndarray | IO[bytes]
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._store, self._held = store, held
        if isinstance(held, np.ndarray):
            store.room -= held.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Sequences [start, stop), not to be changed."""
        stop = min(stop, len(self))
        if isinstance(self._held, np.ndarray):
            return self._held[start:stop]
        part = np.empty((stop - start, *self.shape[1:]), self.dtype)
        left = part.reshape(-1).view(np.uint8).data
        self._held.seek(start * self._nbytes)
        while left:  # one call reads no more than 2 GiB
            count = self._held.readinto(left)  # type: ignore[attr-defined]  # an unbuffered file has it
            assert count, "a value is read that was not written"
            left = left[count:]
        return part

    def write(self, start: int, part: np.ndarray) -> None:
        """Sequences from `start` on."""
        if isinstance(self._held, np.ndarray):
            self._held[start : start + len(part)] = part
            return
        left = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        self._held.seek(start * self._nbytes)
        while left:  # a disk that is all but full takes some of it
            left = left[self._held.write(left) :]

    def free(self) -> None:
        """Nobody needs it any more."""
        if isinstance(self._held, np.ndarray):
            self._store.room += self._held.nbytes
        else:
            self._held.close()
        self._held = np.empty(0, self.dtype)

    @property
    def _nbytes(self) -> int:
        """Of a sequence."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Stream:
    """The values of a model that are still needed, f32[sequences, length, features] by name.

    As a context it forgets them all on leaving: the store's room outlives the stream.
    """

    __slots__ = ("store", "values")

    def __init__(self, store: Store, values: Mapping[str, Value]) -> None:
        self.store, self.values = store, dict(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget(list(self.values))

    def run(self, node: Node, weights: Sequence[Rows]) -> None:
        """Compute a node's value: of as many sequences as may be where a matrix is read for them, else of one by one.

        OSError if the store's disk cannot take it.
        """
        spec = OPS[type(node.op)]
        inputs = [self.values[name] for name in node.inputs]
        shape = spec.shape(node.op, [each.shape for each in inputs], [each.shape for each in weights])
        numbers = COMPUTED if isinstance(node.op, Linear | Embedding) else 0
        largest = max(shape, *(each.shape for each in inputs), key=math.prod)
        parts = list(steps(largest, numbers))
        if len(parts) == 1:
            whole = spec.reference(node.op, [each.read(*parts[0]) for each in inputs], weights)
            self.values[node.name] = self.store.put(whole)
            return
        out = self.store.new(shape)
        for start, stop in parts:
            out.write(start, spec.reference(node.op, [each.read(start, stop) for each in inputs], weights))
        self.values[node.name] = out

    def forget(self, names: Iterable[str]) -> None:
        """Values that no later node needs."""
        for name in names:
            self.values.pop(name).free()

    def copy(self) -> Stream:
        """One that goes on from the same values."""
        return join([self])

    def part(self, streams: Sequence[Stream]) -> None:
        """Give the streams that `join` had joined their shares of what became of them; this one keeps nothing."""
        for stream in streams:
            stream.forget(list(stream.values))
        for name, value in self.values.items():
            share = len(value) // len(streams)
            for k, stream in enumerate(streams):
                stream.values[name] = stream.store.put(value.read(k * share, (k + 1) * share).copy())
        self.forget(list(self.values))


def join(streams: Sequence[Stream]) -> Stream:
    """Streams of as many sequences each as one stream of all their sequences."""
    store, joined = streams[0].store, {}
    for name, value in streams[0].values.items():
        share = len(value)
        joined[name] = store.new((share * len(streams), *value.shape[1:]), value.dtype)
        for k, stream in enumerate(streams):
            joined[name].write(k * share, stream.values[name].read(0, share))
    return Stream(store, joined)


def steps(shape: Sequence[int], numbers: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of sequences of a value of this shape that have so many numbers at most, but for a single one."""
    step = max(1, numbers // math.prod(shape[1:]))
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))
