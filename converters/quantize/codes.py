"""Quantized matrices on disk, between the calibration that found them and the pour that packs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from converters.quantize.tensor import QuantTensor

_PARTS = ("codes", "scale", "zero")


class CodeStore:
    """A folder of quantized matrices; `bits` of each, by weight name. Blocks of rows are read without the rest."""

    def __init__(self, folder: Path, bits: dict[str, int] | None = None) -> None:
        self.folder = folder
        self.bits: dict[str, int] = {} if bits is None else bits

    def __contains__(self, name: str) -> bool:
        return name in self.bits

    def put(self, name: str, tensor: QuantTensor) -> None:
        """Keep a whole matrix, in place of the one that had its name."""
        for part, array in zip(_PARTS, (tensor.codes, tensor.scale, tensor.zero), strict=True):
            if array is None:
                self._path(name, part).unlink(missing_ok=True)
            else:
                np.save(self._path(name, part), array)
        self.bits[name] = tensor.bits

    def rows(self, name: str, start: int, stop: int) -> QuantTensor:
        """Rows [start, stop) of a matrix that was put."""

        def read(part: str) -> np.ndarray:
            rows: np.ndarray = np.load(self._path(name, part), mmap_mode="r")[start:stop]
            return np.array(rows)

        zero = read("zero") if self._path(name, "zero").exists() else None
        return QuantTensor(read("codes"), read("scale"), zero, self.bits[name])

    def files(self, name: str) -> list[Path]:
        """Those of a matrix that was put."""
        return [path for part in _PARTS if (path := self._path(name, part)).exists()]

    def _path(self, name: str, part: str) -> Path:
        return self.folder / f"{name}.{part}.npy"
