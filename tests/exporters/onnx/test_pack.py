"""Packing against a naive packer, and against the operators of ONNX Runtime that read it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from converters.quantize.tensor import QuantTensor
from exporters.nibbles import pack_nibbles, unpack_nibbles
from exporters.onnx import pack
from exporters.onnx.read_back import decoder

ort = pytest.importorskip("onnxruntime")


def random_tensor(seed: int, rows: int, groups: int, size: int, bits: int, asymmetric: bool) -> QuantTensor:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (rows, groups * size), np.uint8)
    scale = random.normal(0, 0.1, (rows, groups)).astype(np.float16)
    zero = random.integers(0, 1 << bits, (rows, groups), np.uint8) if asymmetric else None
    return QuantTensor(codes, scale, zero, bits)


def test_nibbles_by_hand() -> None:
    packed = pack_nibbles(np.array([[1, 2, 15], [0, 8, 7]], np.uint8))
    assert packed.tolist() == [[0x21, 0x0F], [0x80, 0x07]]


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 9))
def test_nibbles_equal_a_naive_packer(seed: int, rows: int, count: int) -> None:
    values = np.random.default_rng(seed).integers(0, 16, (rows, count), np.uint8)
    naive = np.zeros((rows, -(-count // 2)), np.uint8)
    for row in range(rows):
        for index in range(count):
            naive[row, index // 2] |= values[row, index] << (4 * (index % 2))
    assert np.array_equal(pack_nibbles(values), naive)
    assert np.array_equal(unpack_nibbles(naive, count), values)


@given(
    st.integers(0, 2**32),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.sampled_from([16, 32]),
)
def test_round_trip(seed: int, rows: int, groups: int, size: int, bits: int, asymmetric: bool, block: int) -> None:
    tensor = random_tensor(seed, rows, groups, size, bits, asymmetric)
    width, blocks = groups * size, groups * size // block
    scales = pack.pack_scales(tensor, block, np.dtype(np.float32)).view(np.float32).reshape(rows, blocks)
    zeros = pack.pack_zeros(tensor, block).reshape(rows, -1)
    codes = pack.pack_codes(tensor).reshape(rows, -1)
    assert codes.shape[1] == width * bits // 8
    for stored in (zeros, None) if tensor.zero is None else (zeros,):
        feeds = {"codes": codes, "ids": np.arange(rows), "scales": scales}
        feeds |= {} if stored is None else {"zeros": stored}
        found = decoder(bits, block, stored is not None).run(None, feeds)[0]
        assert np.array_equal(found, tensor.dequantize())


Arrays = dict[str, np.ndarray[Any, Any]]


def run(op_type: str, feeds: Arrays, weights: Arrays, attributes: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The output of one com.microsoft operator with constant weights."""
    names = [*feeds, *weights]
    if op_type == "GatherBlockQuantized":
        names = [names[1], names[0], *names[2:]]
    node = helper.make_node(op_type, names, ["y"], domain="com.microsoft", **attributes)
    types = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in feeds.items()}
    inputs = [helper.make_tensor_value_info(name, types[name], value.shape) for name, value in feeds.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph([node], "one", inputs, [output], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray[Any, Any] = session.run(None, feeds)[0]
    return result


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("groups", "size"), [(3, 32), (2, 64), (1, 128), (5, 16)])
def test_onnxruntime_reads_the_same_numbers(bits: int, groups: int, size: int, asymmetric: bool) -> None:
    rows, width = 24, groups * size
    tensor = random_tensor(7, rows, groups, size, bits, asymmetric)
    weights: Arrays = {
        "codes": pack.pack_codes(tensor).reshape(rows, groups, -1),
        "scales": tensor.scale.astype(np.float32),
    }
    if asymmetric:
        weights["zeros"] = pack.pack_zeros(tensor, size).reshape(rows, -1)
    expected = tensor.dequantize()
    blocks = {"bits": bits, "block_size": size}
    x = np.random.default_rng(1).normal(size=(1, 3, width)).astype(np.float32)
    found = run("MatMulNBits", {"x": x}, weights, blocks | {"K": width, "N": rows})
    assert np.allclose(found[0], x[0] @ expected.T, atol=1e-4)
    weights["codes"] = weights["codes"].reshape(rows, -1)
    ids = np.arange(rows, dtype=np.int64)[None]
    axes = {"gather_axis": 0, "quantize_axis": 1}
    gathered = run("GatherBlockQuantized", {"ids": ids}, weights, blocks | axes)
    assert np.array_equal(gathered[0], expected)


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_rows_pack_alone_as_they_do_together(seed: int) -> None:
    tensor = random_tensor(seed, 4, 3, 32, 4, True)
    whole = pack.pack_zeros(tensor, 32).reshape(4, -1)
    assert tensor.zero is not None
    for row in range(4):
        part = QuantTensor(tensor.codes[row : row + 1], tensor.scale[row : row + 1], tensor.zero[row : row + 1], 4)
        assert np.array_equal(pack.pack_zeros(part, 32), whole[row])
