"""Keeps account of a checkpoint's tensors: each is taken once or dropped by name, and shapes are checked on arrival."""

from __future__ import annotations

from collections.abc import Mapping

from converters.checkpoint import LazyTensor
from converters.errors import ModelError


class TensorTable:
    """The tensors of a checkpoint while an architecture builds its graph from them."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = tensors
        self._taken: set[str] = set()
        self.dropped: dict[str, str] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        """The tensor of that name; ModelError if it is missing or misshapen. To be taken once."""
        if name not in self._tensors:
            raise ModelError(
                "tensor missing in the checkpoint",
                where=name,
                expected=f"shape {list(shape)}",
                mend="Download the checkpoint again, or check that config.json belongs to it.",
            )
        tensor = self._tensors[name]
        if tensor.shape != shape:
            raise ModelError(
                "tensor has another shape than config.json says",
                where=f"{name} in {tensor.path.name}",
                expected=str(list(shape)),
                found=str(list(tensor.shape)),
                mend="Check that config.json belongs to this checkpoint.",
            )
        assert name not in self._taken, f"{name} taken twice"
        self._taken.add(name)
        return tensor

    def drop(self, name: str, reason: str) -> None:
        """Leave a tensor out on purpose, if the checkpoint has it."""
        if name in self._tensors:
            self.dropped[name] = reason

    def finish(self) -> None:
        """ModelError if a tensor was neither taken nor dropped."""
        left = sorted(set(self._tensors) - self._taken - set(self.dropped))
        if left:
            shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            raise ModelError(
                "checkpoint has tensors that this architecture does not use",
                found=shown,
                mend="The model differs from its family, so converting it would change what it computes.",
            )
