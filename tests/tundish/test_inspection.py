"""Rows of checkpoints and artifacts, and damaged files as errors that can be read."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from converters.errors import ModelError, UsageError
from exporters.base import Target
from tundish.inspection import inspect_path

WEIGHT_FILES = {
    Target.GGUF: "model.gguf",
    Target.ONNX: "model.onnx",
    Target.OPENVINO: "openvino_model.xml",
    Target.MLX: "model.safetensors",
}


def test_a_checkpoint_as_safetensors_reads_it(checkpoint: Path) -> None:
    found = {row.name: (row.file, row.shape, row.nbytes) for row in inspect_path(checkpoint)}
    expected = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
                shape = tuple(file.get_slice(name).get_shape())
                expected[name] = (path.name, shape, 2 * math.prod(shape))
    assert len({file for file, _, _ in expected.values()}) > 1
    assert found == expected


def test_one_shard_alone(checkpoint: Path) -> None:
    shard = min(checkpoint.glob("*.safetensors"))
    assert {row.file for row in inspect_path(shard)} == {shard.name}


@pytest.mark.parametrize("target", Target)
def test_a_build_an_artifact_and_its_file_have_the_same_rows(target: Target, poured: Path) -> None:
    whole = [row for row in inspect_path(poured) if row.file.startswith(f"{target}/")]
    folder = inspect_path(poured / target)
    assert [(f"{target}/{row.file}", row.name, row.type, row.shape, row.nbytes) for row in folder] == [
        (row.file, row.name, row.type, row.shape, row.nbytes) for row in whole
    ]
    assert inspect_path(poured / target / WEIGHT_FILES[target]) == folder
    written = sum((poured / target / name).stat().st_size for name in {row.file for row in folder})
    # Beside the tensors there are headers, and in GGUF the vocabulary too; a tied matrix would show twice.
    assert 0 < sum(row.nbytes for row in folder) <= written


@pytest.mark.parametrize("target", Target)
def test_a_damaged_file(target: Target, poured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(poured / target, folder)
    path = folder / WEIGHT_FILES[target]
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ModelError, match=r"weight files cannot be read.*; found .*damaged or incomplete"):
        inspect_path(folder)


def test_neither(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a checkpoint nor an artifact"):
        inspect_path(tmp_path)
    with pytest.raises(UsageError, match="nothing there"):
        inspect_path(tmp_path / "absent")
