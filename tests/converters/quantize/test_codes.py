"""Quantized matrices come back from disk as they were put there, in any rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from converters.quantize.codes import CodeStore
from converters.quantize.rtn import quantize_rtn
from converters.quantize.scheme import SCHEMES
from converters.quantize.tensor import QuantTensor


@pytest.mark.parametrize("name", ["int4_g32", "int4_asym_g64", "int8_channel"])
def test_rows_come_back(tmp_path: Path, name: str) -> None:
    store = CodeStore(tmp_path)
    tensor = quantize_rtn(np.random.default_rng(0).standard_normal((10, 128)).astype(np.float32), SCHEMES[name])
    store.put("blocks.0.mlp_up", tensor)
    assert "blocks.0.mlp_up" in store and "blocks.0.mlp_down" not in store
    parts = [store.rows("blocks.0.mlp_up", start, stop) for start, stop in ((0, 3), (3, 10))]
    np.testing.assert_array_equal(np.concatenate([part.codes for part in parts]), tensor.codes)
    np.testing.assert_array_equal(np.concatenate([part.scale for part in parts]), tensor.scale)
    assert all((part.zero is None) == (tensor.zero is None) and part.bits == tensor.bits for part in parts)
    np.testing.assert_array_equal(np.concatenate([part.dequantize() for part in parts]), tensor.dequantize())


def test_what_is_put_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    asymmetric, symmetric = (quantize_rtn(weight, SCHEMES[name]) for name in ("int4_asym_g32", "int4_g32"))
    store = CodeStore(tmp_path)

    def back(tensor: QuantTensor) -> QuantTensor:
        store.put("head", tensor)
        return store.rows("head", 0, 4)

    for tensor in (asymmetric, symmetric, asymmetric):
        np.testing.assert_array_equal(back(tensor).dequantize(), tensor.dequantize())
        assert len(store.files("head")) == len(list(tmp_path.iterdir())) == (2 if tensor.zero is None else 3)
