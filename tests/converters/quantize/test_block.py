"""Rows of a tensor under its scheme: numbers that a scheme cannot hold are errors, whatever the scheme."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.checkpoint import open_checkpoint
from converters.errors import ModelError
from converters.graph import Weight
from converters.quantize.block import dequantize, quantize_rows
from converters.quantize.scheme import SCHEMES, Scheme
from converters.role import Role


def weight_of(folder: Path, values: list[float], scheme: Scheme) -> Weight:
    """Two rows of 256 zeros; the second one begins with the values."""
    rows = np.zeros((2, 256), np.float32)
    rows[1, : len(values)] = values
    save_file({"a": rows}, folder / "model.safetensors")
    return Weight("blocks.0.mlp_up", Role.MLP_UP, 0, open_checkpoint(folder)["a"], scheme)


@pytest.mark.parametrize("scheme", [each for each in SCHEMES.values() if each.bits != 32], ids=lambda each: each.name)
def test_values_beyond_a_scheme_are_refused(scheme: Scheme, tmp_path: Path) -> None:
    weight = weight_of(tmp_path, [3.4e38, -3.4e38], scheme)
    with pytest.raises(ModelError, match=r"weights .*\(blocks\.0\.mlp_up in model\.safetensors\).*3\.4e\+38"):
        quantize_rows(weight, 0, 2)
    assert not dequantize(quantize_rows(weight, 0, 1)).any(), "rows without them are no error"


def test_the_largest_bf16_is_kept(tmp_path: Path) -> None:
    largest = float(np.float32(2**127) * np.float32(2 - 2**-7))
    weight = weight_of(tmp_path, [largest, -largest], SCHEMES["bf16"])
    assert dequantize(quantize_rows(weight, 0, 2))[1, :2].tolist() == [largest, -largest]
