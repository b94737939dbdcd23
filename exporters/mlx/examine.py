"""What is in an MLX folder, and what MLX can use here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from exporters.base import TensorRow


def tensors(folder: Path) -> Iterator[TensorRow]:
    """A row a tensor of the folder's safetensors files, by safetensors' own reader."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
                view = file.get_slice(name)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
                count = 1
                for size in shape:
                    count *= size
                yield TensorRow(path.name, name, dtype, shape, count * int(dtype.lstrip("UIBF")) // 8)


def devices() -> list[str]:
    """MLX's default device."""
    import mlx.core as mx

    return [str(mx.default_device())]
