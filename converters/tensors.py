"""Keeps account of a checkpoint's tensors: each is taken once or dropped by name, and shapes are checked on arrival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converters.checkpoint import LazyTensor
from converters.errors import ModelError
from converters.tensor_names import is_rotary_buffer

_LORA = ".lora_"  # in the names of peft's matrices


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class TensorTable:
    """The tensors of a checkpoint while an architecture builds its graph from them."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = tensors
        self._taken: set[str] = set()
        self.dropped: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        """The tensor of that name; ModelError if it is missing or misshapen. To be taken once."""
        if name not in self._tensors:
            raise self._missing(name, shape)
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

    def _missing(self, name: str, shape: tuple[int, ...]) -> ModelError:
        """What is there instead: tensors that end like it, if there are some."""
        others = [each for each in self._tensors if each not in self._taken and each not in self.dropped]
        alike = [each for each in others if each.endswith("." + name.removeprefix("model."))]
        mend = "Download the checkpoint again, or check that config.json belongs to it."
        if alike:
            mend = "The names have another prefix: load the model by what saved it, and save it with save_pretrained."
        if any(_LORA in each for each in others):
            mend = "The checkpoint holds an adapter beside its model: merge it by peft's merge_and_unload first."
        return ModelError(
            "tensor missing in the checkpoint",
            where=name,
            expected=f"shape {list(shape)}",
            found=f"in its place {_listed(alike or others)}" if others else None,
            mend=mend,
        )

    def drop(self, name: str, reason: str) -> None:
        """Leave a tensor out on purpose, if the checkpoint has it."""
        if name in self._tensors:
            self.dropped[name] = reason

    def drop_rotary_buffers(self) -> None:
        """Leave out what follows from config.json, as transformers does."""
        for name in filter(is_rotary_buffer, self._tensors):
            self.drop(name, "computed from config.json")

    def finish(self) -> None:
        """ModelError if a tensor was neither taken nor dropped."""
        left = sorted(set(self._tensors) - self._taken - set(self.dropped))
        if left:
            raise ModelError(
                "checkpoint has tensors that this architecture does not use",
                found=_listed(left),
                mend="The model differs from its family, so converting it would change what it computes.",
            )
