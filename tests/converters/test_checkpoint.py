"""Safetensors folders: what is read, and every kind of damage refused before a weight is read."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from converters import checkpoint
from converters.checkpoint import RowView, open_checkpoint
from converters.errors import ModelError
from converters.quantize.tensor import FloatArray
from converters.source import source_digest
from converters.tensors import TensorTable

A = np.arange(24, dtype=np.float32).reshape(6, 4)
B = np.linspace(-3, 3, 10, dtype=np.float16)
INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, **weight_map: str) -> Path:
    """Two shards and their index; weight_map overrides entries of the index."""
    save_file({"a": A}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": B}, folder / "model-00002-of-00002.safetensors")
    stated = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"} | weight_map
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": stated}))
    return folder


def write_raw(folder: Path, header: object, data: bytes) -> Path:
    """model.safetensors with this header, whether right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def entry(dtype: str, shape: list[object], begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_single_file(tmp_path: Path, dtype: type) -> None:
    stored: FloatArray = A.astype(dtype)
    save_file({"a": stored, "b": B, "empty": np.empty((0, 4), np.float32)}, tmp_path / "model.safetensors")
    tensors = open_checkpoint(tmp_path)
    assert set(tensors) == {"a", "b", "empty"}
    tensor = tensors["a"]
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == ((6, 4), np.dtype(dtype), stored.nbytes)
    assert np.array_equal(tensor.read(2, 5), stored[2:5])
    view = RowView(tensor, 1, 4)
    assert view.shape == (3, 4)
    assert np.array_equal(view.read(1, 3), stored[2:4])
    assert view.location == (tensor.location[0], tensor.location[1] + 4 * stored.itemsize)


def test_float64_is_read_as_float32(tmp_path: Path) -> None:
    wide = np.linspace(-1, 1, 24).reshape(6, 4) ** 3
    save_file({"a": wide, "b": B}, tmp_path / "model.safetensors")
    tensor = open_checkpoint(tmp_path)["a"]
    assert (tensor.dtype, tensor.nbytes) == (np.dtype(np.float32), 192)
    assert np.array_equal(tensor.read(2, 5), wide[2:5].astype(np.float32))
    assert tensor.read(2, 5).dtype == np.float32


def test_float64_beyond_float32_is_infinite(tmp_path: Path) -> None:
    save_file({"a": np.full(3, 1e300)}, tmp_path / "model.safetensors")
    assert np.isinf(open_checkpoint(tmp_path)["a"].read(0, 3)).all()


def test_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "COMPARED", 8)
    other = A.copy()
    other[5, 3] += 1
    half = A.astype(np.float16)
    save_file({"a": A, "half": half, "other": other, "flat": A.reshape(-1)}, tmp_path / "model.safetensors")
    tensors = open_checkpoint(tmp_path)
    assert checkpoint.same_numbers(tensors["a"], tensors["half"])
    assert not checkpoint.same_numbers(tensors["a"], tensors["other"])
    assert not checkpoint.same_numbers(tensors["a"], tensors["flat"])


def test_shards(tmp_path: Path) -> None:
    tensors = open_checkpoint(write_shards(tmp_path))
    assert np.array_equal(tensors["a"].read(0, 6), A)
    assert np.array_equal(tensors["b"].read(3, 7), B[3:7])


def test_unrelated_files_beside_the_weights(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"tok_embeddings.weight": A}, tmp_path / "consolidated.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert set(open_checkpoint(tmp_path)) == {"a", "b"}


def test_hub_cache_snapshot_is_links_into_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / "0123"
    blobs = tmp_path / "models--acme--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": A}, blobs / "f00d")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/f00d"))
    assert set(open_checkpoint(snapshot)) == {"a"}


def test_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"a": A}, tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert "outside of its folder" in refusal(folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/hostname", "x/../../secret.safetensors"])
def test_index_leads_out_of_the_folder(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"a": A}, tmp_path / "secret.safetensors")
    message = refusal(write_shards(folder, a=shard))
    assert "outside of its folder" in message
    assert shard in message


@pytest.mark.parametrize("shard", ["a\0b", "a" * 5000, "loop.safetensors"])
def test_impossible_name_of_a_shard(tmp_path: Path, shard: str) -> None:
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    assert repr(shard)[1:20] in refusal(write_shards(tmp_path, a=shard))


def test_half_a_surrogate_pair_as_a_shard(tmp_path: Path) -> None:
    assert "surrogates not allowed" in refusal(write_shards(tmp_path, a="\ud800"))


def test_pipe_or_folder_instead_of_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a file" in refusal(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    assert "not a file" in refusal(tmp_path)


def test_shards_of_one_name_in_two_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save_file({"a": A}, tmp_path / "x.safetensors")
    save_file({"b": B}, tmp_path / "sub" / "x.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "sub/x.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert set(open_checkpoint(tmp_path)) == {"a", "b"}
    assert {"x.safetensors", "sub/x.safetensors"} < set(source_digest(tmp_path))
    index["weight_map"] |= {"a": "sub/x.safetensors", "b": "x.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "index and shards disagree" in refusal(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    (write_shards(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    message = refusal(tmp_path)
    assert "missing" in message
    assert "model-00002-of-00002.safetensors" in message


def test_index_names_an_absent_tensor(tmp_path: Path) -> None:
    assert "c" in refusal(write_shards(tmp_path, c="model-00001-of-00002.safetensors"))


def test_index_names_another_shard(tmp_path: Path) -> None:
    message = refusal(
        write_shards(tmp_path, a="model-00002-of-00002.safetensors", x="model-00001-of-00002.safetensors")
    )
    assert "index and shards disagree" in message


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"a": A, "b": B}, tmp_path / "model-00002-of-00002.safetensors")
    assert "tensor stored twice (a)" in refusal(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, "a"])
def test_malformed_index(tmp_path: Path, weight_map: object) -> None:
    (write_shards(tmp_path) / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "malformed index" in refusal(tmp_path)


@pytest.mark.parametrize("length", [0, 4, 8, 40, -1])
def test_cut_off_file(tmp_path: Path, length: int) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:length])
    message = refusal(tmp_path)
    assert "cut off (model.safetensors)" in message
    assert f"found {len(data[:length])}" in message


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"not json", b"", "no valid JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "nested too deep"),
        (b"[]", b"", "no JSON object"),
        (b'{"a": {}, "a": {}}', b"", "'a' twice"),
        ({"a": 3}, b"", "malformed safetensors header"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "malformed safetensors header"),
        ({"a": entry("F32", [2], 0, "8")}, bytes(8), "malformed safetensors header"),
        ({"a": entry("F32", [-2], 0, 8)}, bytes(8), "malformed safetensors header"),
        ({"a": entry("F32", [2.0], 0, 8)}, bytes(8), "malformed safetensors header"),
        ({"a": entry("F32", [3], 0, 8)}, bytes(8), "expected 12 bytes for F32.*found 8"),
        ({"a": entry("F32", [2], 8, 0)}, bytes(8), "do not fit its shape"),
        ({"a": entry("F32", [1 << 62, 1 << 62], 0, 8)}, bytes(8), "do not fit its shape"),
        ({"a": entry("F32", [1] * 9, 0, 4)}, bytes(4), "malformed safetensors header.*at most 8"),
        ({"a": entry("F32", [1 << 63, 0], 0, 0)}, b"", "malformed safetensors header"),
        ({"a": entry("I8", [8], 0, 8)}, bytes(8), "expected BF16, F16, F32, F64; found I8"),
        ({"a": entry("F8_E4M3", [8], 0, 8)}, bytes(8), "already quantized.*found F8_E4M3, as in FP8, 8 bits"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12), "overlap or leave a hole.*tensor b"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, bytes(20), "overlap or leave a hole"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 8, 16)}, bytes(15), "cut off"),
        ({"a": entry("F32", [2], 0, 8)}, bytes(9), "too long"),
    ],
)
def test_damaged_header(tmp_path: Path, header: object, data: bytes, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        open_checkpoint(write_raw(tmp_path, header, data))


def test_absurd_header_length(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert "header cannot be that long" in refusal(tmp_path)


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    tensor = open_checkpoint(tmp_path)["a"]
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-8])
    with pytest.raises(ModelError, match=r"shorter than its header says.*tensor a"):
        tensor.read(0, 6)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        tensor.read(0, 6)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "m.pt"]
)
def test_pickles_only(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    message = refusal(tmp_path)
    assert "pickled weights only" in message
    assert name in message
    assert "safe_serialization" in message


def test_no_weights(tmp_path: Path) -> None:
    assert "no weights" in refusal(tmp_path)


def test_shards_without_index(tmp_path: Path) -> None:
    (write_shards(tmp_path) / INDEX).unlink()
    assert "weights without their index" in refusal(tmp_path)


def test_table_takes_each_tensor_once(tmp_path: Path) -> None:
    table = TensorTable(open_checkpoint(write_shards(tmp_path)))
    assert table.take("a", (6, 4)).name == "a"
    table.drop("absent", "not there")
    assert table.dropped == {}
    with pytest.raises(ModelError, match=r"tensor missing.*\(c\)"):
        table.take("c", (1,))
    with pytest.raises(ModelError, match=r"another shape.*expected \[9\]; found \[10\]"):
        table.take("b", (9,))
    with pytest.raises(ModelError, match="does not use; found b"):
        table.finish()
    table.drop("b", "not needed")
    table.finish()
    assert table.dropped == {"b": "not needed"}
