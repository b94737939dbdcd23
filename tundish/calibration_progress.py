"""What an unfinished calibration has come to, kept so that the next build goes on with it.

Its folder holds what the entry of the cache will hold, as far as it is found, and beside that the values that the two
models need to go on behind a block (converters.quantize.sequential.Progress). The index names every file with its
SHA-256. It is replaced once they are on the disk, and only then what it named before is removed: whenever a process
dies, the index that is there names files that are whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from converters.quantize.codes import CodeStore
from converters.quantize.sequential import Progress
from converters.quantize.stream import COMPUTED, Store, Value, steps
from converters.quantize.tensor import F32
from tundish.cache import Json, write_index

TEXT, SCALES, IMPORTANCE = "text.npy", "scales.npz", "importance.npz"
Write = Callable[[Path], None]
_PATIENCE = 30  # times as long as keeping took it takes until it is done again: a thirtieth of the time goes into it


class Workplace:
    """A folder in which a calibration is made, and what an earlier process came to there.

    token_ids: i64[sequences, length], what the model wrote; scales: f32[in] by the name of a Linear; bits: of fitted
    matrices by name. None or empty: not found yet. `was_kept`: whether anything was.
    """

    def __init__(self, folder: Path, about: Json | None = None, say: Callable[[str], None] = lambda text: None) -> None:
        """`about`: what the index says of the calibration; None: nothing is kept of one that is not finished."""
        self.folder = folder
        self.token_ids: NDArray[np.int64] | None = None
        self.scales: Mapping[str, F32] | None = None
        self.bits: Mapping[str, int] = {}
        self.was_kept = False
        self._about, self._say = about, say
        self._files: dict[str, Json] = {}
        self._reached: Json | None = None
        self._cost, self._last = 0.0, 0.0

    def take_over(self, index: Json) -> None:
        """Go on with what an index says, whose files were found as it has them."""
        self.was_kept, self._files, self._reached = True, dict(index["files"]), index["reached"]
        self.token_ids = np.load(self.folder / TEXT, allow_pickle=False) if TEXT in self._files else None
        self.scales = load_arrays(self.folder / SCALES) if SCALES in self._files else None
        self.bits = {} if self._reached is None else self._reached["bits"]

    def progress(self, store: Store) -> Progress | None:
        """How far an earlier process was, its values in a store; None: at the beginning."""
        if self._reached is None:
            return None
        quantized, floats = (
            {name: self._value(store, **entry) for name, entry in self._reached[stream].items()}
            for stream in ("quantized", "floats")
        )
        importance = load_arrays(self.folder / self._reached["importance"])
        return Progress(self._reached["index"], quantized, floats, importance)

    def keep_text(self, token_ids: NDArray[np.int64]) -> None:
        """Keep what the model wrote."""
        self._keep({TEXT: lambda path: np.save(path, token_ids)})

    def keep_scales(self, scales: Mapping[str, F32]) -> None:
        """Keep the factors of columns."""
        self._keep({SCALES: partial(save_arrays, arrays=scales)})

    def keep_progress(self, codes: CodeStore | None, progress: Progress) -> None:
        """Keep what was found up to here, unless that was done a moment ago. `codes` has the fitted matrices."""
        if not progress.importance or perf_counter() - self._last < _PATIENCE * self._cost:
            return
        bits = {} if codes is None else dict(codes.bits)
        reached: Json = {"index": progress.index, "bits": bits, "importance": f"{progress.index}.{IMPORTANCE}"}
        writes: dict[str, Write] = {reached["importance"]: partial(save_arrays, arrays=progress.importance)}
        for stream, values in (("quantized", progress.quantized), ("floats", progress.floats)):
            reached[stream] = {}
            for number, (name, value) in enumerate(values.items()):
                file = f"{progress.index}.{stream}{number}.value"
                reached[stream][name] = {"file": file, "shape": value.shape, "dtype": value.dtype.str}
                writes[file] = partial(_save_value, value=value)
        fitted = [] if codes is None else [path.name for name in bits for path in codes.files(name)]
        self._keep(writes, fitted, reached)

    def passing(self) -> list[Path]:
        """Files that only a calibration that goes on needs, beside the index."""
        return [self.folder / name for name in self._files if name == TEXT or _is_passing(name)]

    def _keep(self, writes: Mapping[str, Write], fitted: Iterable[str] = (), reached: Json | None = None) -> None:
        """Write files, and an index that has them and those of fitted matrices, which are there already. What the last
        `reached` needed is then gone.

        A calibration is not lost with its progress: where that cannot be written, it is not kept from then on.
        """
        if self._about is None:
            return
        start = perf_counter()
        files = {name: entry for name, entry in self._files.items() if reached is None or not _is_passing(name)}
        try:
            for name, write in writes.items():
                write(self.folder / name)
            files |= {name: _settled(self.folder / name) for name in (*writes, *fitted) if name not in files}
            write_index(self.folder, {**self._about, "reached": reached, "files": files})
        except OSError as error:
            self._say(f"warning: progress of the calibration is not kept from here on: {error.strerror or error}")
            self._about = None
            _remove(self.folder / name for name in writes)
            return
        _remove(self.folder / name for name in self._files.keys() - files.keys())
        self._files, self.was_kept = files, True
        self._last = perf_counter()
        self._cost = self._last - start

    def _value(self, store: Store, file: str, shape: list[int], dtype: str) -> Value:
        value = store.new(tuple(shape), np.dtype(dtype))
        with (self.folder / file).open("rb") as source:
            for start, stop in steps(shape, COMPUTED):
                part = np.fromfile(source, dtype, (stop - start) * int(np.prod(shape[1:])))
                value.write(start, part.reshape(stop - start, *shape[1:]))
        return value


def save_arrays(path: Path, arrays: Mapping[str, F32]) -> None:
    """Write arrays by name."""
    np.savez(path, **arrays)  # type: ignore[arg-type]  # as numpy has it, any name may be allow_pickle


def load_arrays(path: Path) -> dict[str, F32]:
    """What save_arrays wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _remove(paths: Iterable[Path]) -> None:
    """What cannot be removed is in no index, and the next build removes it."""
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _is_passing(name: str) -> bool:
    """Whether a file belongs to one progress only, by its name: codes stay."""
    return name.endswith((".value", f".{IMPORTANCE}"))


def _save_value(path: Path, value: Value) -> None:
    with path.open("wb") as file:
        for start, stop in steps(value.shape, COMPUTED):
            file.write(np.ascontiguousarray(value.read(start, stop)).data)


def _settled(path: Path) -> Json:
    """What an index says of a file, which is on the disk then."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
