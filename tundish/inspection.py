"""What is in a checkpoint, a build or an artifact, a row a tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from converters.checkpoint import open_checkpoint
from converters.errors import ModelError, TundishError, UsageError
from exporters.base import Target, TensorRow
from exporters.registry import EXPORTERS
from tundish.manifest_file import MANIFEST
from tundish.plan import require_modules

# The file by which each container's folder is known.
_SIGNS = {
    Target.GGUF: "*.gguf",
    Target.ONNX: "*.onnx",
    Target.OPENVINO: "openvino_model.xml",
}


def inspect_path(path: Path) -> list[TensorRow]:
    """The tensors of a checkpoint folder, a build folder, an artifact folder, or the folder of a weight file."""
    if not path.exists():
        raise UsageError("nothing there", where=str(path))
    folder = path if path.is_dir() else path.parent
    if (folder / MANIFEST).is_file():
        parts = [(target, folder / target) for target in Target if (folder / target).is_dir()]
        return [
            replace(row, file=f"{target}/{row.file}") for target, part in parts for row in _artifact_rows(target, part)
        ]
    for target, sign in _SIGNS.items():
        if any(folder.glob(sign)):
            return _artifact_rows(target, folder)
    if not any(folder.glob("*.safetensors*")) and not (folder / "config.json").is_file():
        raise UsageError("neither a checkpoint nor an artifact", where=str(path))
    if path.is_file() or _is_mlx(folder):
        rows = [row for row in _artifact_rows(Target.MLX, folder) if path.is_dir() or row.file == path.name]
        if not rows:
            raise UsageError(
                "not a weight file", where=str(path), mend="Give its folder, or a .safetensors file in it."
            )
        return rows
    return [
        TensorRow(tensor.path.name, tensor.name, str(tensor.stored), tensor.shape, tensor.nbytes)
        for tensor in open_checkpoint(folder).values()
    ]


def _is_mlx(folder: Path) -> bool:
    """Whether the safetensors hold MLX's packed codes, which are no floats."""
    return any(row.type == "U32" for row in _artifact_rows(Target.MLX, folder))


def _artifact_rows(target: Target, folder: Path) -> list[TensorRow]:
    exporter = EXPORTERS[target]
    require_modules(exporter)
    odd = sorted(path.name for path in folder.iterdir() if path.exists() and not (path.is_file() or path.is_dir()))
    if odd:  # before a runtime opens it, which would wait for whoever writes to a pipe
        raise ModelError("not a file, but a pipe or a device", where=str(folder / odd[0]))
    try:
        return list(exporter.tensors(folder))
    except TundishError:
        raise
    except Exception as error:  # each container's own reader raises what it likes over a damaged file
        raise ModelError(
            "the weight files cannot be read",
            where=str(folder),
            found=next(iter(str(error).splitlines()), "") or type(error).__name__,
            mend="It is damaged or incomplete: download or build it again.",
        ) from error
