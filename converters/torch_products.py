"""Products on a device of torch's: the only module that imports torch, and imported only for who asks for a device.

Arrays are copied to the device and back for each product. What is left of the time there is that of the products as
long as they are large, as those of a calibration are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from converters.errors import ResourceError, UsageError
from converters.quantize.tensor import F32


@dataclass(frozen=True, slots=True)
class TorchProducts:
    """See converters.arrays.Products. `name` is torch's version and the device.

    float32 is float32: torch takes no shorter formats (TF32) for products unless a program asks it to.
    """

    device: torch.device
    name: str

    @classmethod
    def on(cls, device: str) -> TorchProducts:
        """UsageError if torch cannot compute on the device."""
        try:
            chosen = torch.device(device)
            found = cls(chosen, f"torch {torch.__version__} {chosen}")
            a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((3, 2), np.float32)
            if not np.array_equal(found._back(found._there(a) @ found._there(b)), a @ b):
                raise RuntimeError("products of small integers are wrong there")
        except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:  # each backend has its own
            raise UsageError(
                "torch cannot compute on the device",
                where=device,
                expected="a device of this machine that the installed torch supports, such as cpu, cuda, cuda:1 or mps",
                found=(str(error).splitlines() or [type(error).__name__])[0],
                mend="Choose another with --device, or leave it out: numpy then computes.",
            ) from error
        return found

    def product(self, a: F32, b: F32) -> F32:
        """a @ b, f32[m, n]."""
        with self._within_memory():
            there = self._there(a)
            return self._back(there @ (there.T if _transposed(a, b) else self._there(b)))

    def linear(self, x: F32, weights: Iterable[F32], out: F32) -> None:
        """x stays on the device while the weights pass."""
        with self._within_memory():
            inputs, start = self._there(x), 0
            for weight in weights:
                stop = start + len(weight)
                out[:, start:stop] = self._back(inputs @ self._there(weight).T)
                start = stop

    def attend(self, q: F32, k: F32, v: F32, mask: F32) -> F32:
        """Written out as the reference is: torch's own attention may compute in another order on each device."""
        with self._within_memory():
            scores = (self._there(q) * q.shape[-1] ** -0.5) @ self._there(k).T
            return self._back(torch.softmax(scores + self._there(mask), dim=-1) @ self._there(v))

    def _there(self, array: F32) -> torch.Tensor:
        with warnings.catch_warnings():
            # Nothing here writes to it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
            return torch.from_numpy(array).to(self.device)

    def _back(self, value: torch.Tensor) -> F32:
        array: F32 = value.cpu().numpy()
        return array

    @contextmanager
    def _within_memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                "the device has not enough memory for a product",
                where=str(self.device),
                found=str(error).splitlines()[0],
                mend="Calibrate with fewer sequences, on another device, or without --device.",
            ) from error


def _transposed(a: F32, b: F32) -> bool:
    """Whether both are one array seen twice, the second transposed: it needs to be copied only once."""
    return a.shape == b.shape[::-1] and a.strides == b.strides[::-1] and a.ctypes.data == b.ctypes.data
