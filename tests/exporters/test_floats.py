"""Floats are stored as they are, or in another type that holds them; what it does not hold is an error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("onnx")

from converters.errors import ModelError
from converters.quantize.tensor import U8
from converters.role import Role
from exporters.base import Activations, Model, Target
from exporters.floats import pack_floats
from exporters.options import OPTIONS
from exporters.registry import EXPORTERS
from tests.converters.arrays import ArraySource
from tests.exporters.tiny_checkpoints import make_model

FP16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


def test_floats() -> None:
    values = np.array([1.5, -2.0], np.float32)
    for dtype in (np.dtype("<f4"), FP16, BF16):
        expected = values.astype(dtype).tobytes()
        assert pack_floats(values, dtype, "here").tobytes() == expected
        assert pack_floats(values.astype(dtype)[None], dtype, "here").tobytes() == expected
    largest = np.array([65504.0], np.float32)
    assert pack_floats(largest, FP16, "here").view("<f2") == largest


@pytest.mark.parametrize(("dtype", "value", "most"), [(FP16, 1e5, "65504"), (BF16, 3.4e38, r"3.38953e\+38")])
def test_what_a_type_does_not_hold(dtype: np.dtype[np.generic], value: float, most: str) -> None:
    found = rf"outside the range of {dtype.name} \(here\); expected magnitudes up to {most}; found {value:g}"
    with pytest.raises(ModelError, match=found.replace("e+", r"e\+")):
        pack_floats(np.array([1.0, -value], np.float32), dtype, "here")


def large_norms(folder: Path) -> Model:
    model = make_model("llama3", folder, "int4_g32")
    large = {
        name: replace(weight, source=ArraySource(np.full(weight.shape, 1e5, np.float32)))
        for name, weight in model.graph.weights.items()
        if weight.role is Role.NORM
    }
    return replace(model, graph=replace(model.graph, weights={**model.graph.weights, **large}))


@pytest.mark.parametrize("target", [Target.ONNX, Target.MLX])
def test_a_norm_that_the_activations_do_not_hold_is_named(target: Target, tmp_path: Path) -> None:
    """Norms are not read back: an infinite one would show in the logits only."""
    model = large_norms(tmp_path)
    values = model.graph.weights["blocks.1.mlp_norm"].source.read(0, 64)

    def packed(activations: Activations) -> U8:
        layout = EXPORTERS[target].layout(model, OPTIONS[target](activations=activations))
        return layout.places["blocks.1.mlp_norm"][0].pack(values)

    assert packed(Activations.FP32).view("<f4").tolist() == [1e5] * len(values)
    with pytest.raises(ModelError, match=rf"target {target}, .*1.*norm.*activations to fp32"):
        packed(Activations.FP16)
