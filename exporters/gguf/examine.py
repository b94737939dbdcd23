"""What is in a GGUF file, and what llama.cpp can use here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from exporters.base import TensorRow


def tensors(folder: Path) -> Iterator[TensorRow]:
    """A row a tensor of every .gguf file in the folder; shapes are [out, in], the reverse of GGUF's own order."""
    from converters.gguf_file import read_gguf  # gguf takes a while to import

    for path in sorted(folder.glob("*.gguf")):
        for tensor in read_gguf(path).tensors.values():
            yield TensorRow(path.name, tensor.name, tensor.type.name, tensor.shape, tensor.nbytes)


def devices() -> list[str]:
    """llama.cpp's wheel from PyPI computes on the CPU."""
    import xllamacpp

    return [device["description"] for device in xllamacpp.get_device_info()]
