"""Importance matrices that tundish writes: gguf-py reads them, and they weigh errors as the text itself does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from converters.errors import UsageError
from converters.interpret import interpret
from converters.ops import Linear
from converters.quantize.imatrix import read_imatrix, write_imatrix
from converters.source import Source
from tests.tundish.tiny import INT4, QUIET, write_recipe
from tundish import importance_matrix
from tundish.calibrate import calibration_ids, origin_of
from tundish.importance_matrix import make_imatrix
from tundish.job import Choices, build
from tundish.model import open_model
from tundish.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
TEXT = {"source": "text", "text": str(ROOT / "LICENSE"), "sequences": 4, "length": 32, "seed": 1}
RANDOM = {"source": "random-tokens", "tokens": 32}
SELF = {"source": "self", "sequences": 2, "length": 32}


def recipe(folder: Path, checkpoint: Path, calibration: dict[str, Any] | None, **changes: Any) -> Path:
    keys: dict[str, Any] = {"targets": {"gguf": {}}, "context": 128, "schemes": INT4}
    if calibration is not None:
        keys["calibration"] = calibration
    return write_recipe(folder / "r.yaml", checkpoint, **keys | changes)


def digests(folder: Path, path: Path, name: str) -> dict[str, str]:
    weights = build(Choices(str(path), out=folder / name, verify=False), QUIET)["weights"]
    return {key: row["digest"] for key, row in weights.items() if "digest" in row}


@pytest.mark.parametrize("calibration", [TEXT, RANDOM, SELF])
def test_a_build_by_the_file_is_one_by_the_text(checkpoint: Path, tmp_path: Path, calibration: dict[str, Any]) -> None:
    expected = digests(tmp_path, recipe(tmp_path, checkpoint, calibration), "text")
    assert expected != digests(tmp_path, recipe(tmp_path, checkpoint, None), "none")
    for name in ("i.gguf", "i.dat"):
        path = recipe(tmp_path, checkpoint, calibration)
        make_imatrix(Choices(str(path)), tmp_path / name, None, QUIET)
        path = recipe(tmp_path, checkpoint, {"source": "imatrix", "file": str(tmp_path / name)})
        assert digests(tmp_path, path, name + "-out") == expected


def test_what_gguf_py_reads(checkpoint: Path, tmp_path: Path) -> None:
    """Sums of squares over all tokens, by the interpreter; floats, and the method and budget of a recipe, do not
    matter."""
    path = recipe(tmp_path, checkpoint, TEXT, schemes={"default": "fp16"})
    document = make_imatrix(Choices(str(path)), tmp_path / "i.gguf", None, QUIET)
    reader = GGUFReader(tmp_path / "i.gguf")
    kept = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert kept == {
        "general.type": "imatrix",
        "imatrix.datasets": ["LICENSE"],
        "imatrix.chunk_count": 4,
        "imatrix.chunk_size": 32,
    }
    made = load_recipe(path)
    model = open_model(Source("tiny", checkpoint), made)
    ids = calibration_ids(model, made.calibration, origin_of(made.calibration), 4, 32)
    sums: dict[str, np.ndarray] = {}

    def observe(node: Any, inputs: Any) -> None:
        if isinstance(node.op, Linear):
            sums[node.op.weights[0]] = np.square(inputs[0], dtype=np.float64).sum(axis=(0, 1))

    head = model.graph.nodes[-1]
    observe(head, [interpret(model.graph, ids, stop_at=head.inputs[0], observe=observe)])
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    parts = {"attn_qkv": "attn_q", "attn_output": "attn_output", "ffn_up": "mlp_gate", "ffn_down": "mlp_down"}
    names = {f"blk.{layer}.{name}": f"blocks.{layer}.{part}" for layer in (0, 1) for name, part in parts.items()}
    names["output"] = "lm_head"
    assert tensors.keys() == {f"{name}.weight.{kind}" for name in names for kind in ("in_sum2", "counts")}
    for name, weight in names.items():
        np.testing.assert_allclose(tensors[f"{name}.weight.in_sum2"][0], sums[weight], rtol=1e-4)
        assert tensors[f"{name}.weight.counts"].tolist() == [[128.0]]
    assert (document["entries"], document["chunks"], document["chunk_size"]) == (len(names), 4, 32)
    assert document["bytes"] == (tmp_path / "i.gguf").stat().st_size
    first = (tmp_path / "i.gguf").read_bytes()
    path = recipe(tmp_path, checkpoint, TEXT, method="gptq", budget="5bpw")
    make_imatrix(Choices(str(path)), tmp_path / "i.gguf", None, QUIET)
    assert (tmp_path / "i.gguf").read_bytes() == first, "and one of this model is replaced"
    make_imatrix(Choices(str(path)), tmp_path / "i.gguf", "dat", QUIET)
    assert read_imatrix(tmp_path / "i.gguf").chunk_size is None, "the older form has none"
    assert {each.name for each in tmp_path.iterdir()} == {"i.gguf", "r.yaml"}


@pytest.mark.parametrize("calibration", [None, {"source": "imatrix", "file": "i.gguf"}])
def test_a_recipe_that_measures_nothing(checkpoint: Path, tmp_path: Path, calibration: dict[str, Any] | None) -> None:
    path = recipe(tmp_path, checkpoint, calibration)
    with pytest.raises(UsageError, match=r"measures nothing \(.*r\.yaml:1\).*random-tokens; found (none|imatrix)"):
        make_imatrix(Choices(str(path)), tmp_path / "i.gguf", None, QUIET)
    assert not (tmp_path / "i.gguf").exists()


def test_what_is_something_else_stays(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance_matrix, "_measure", lambda *arguments: pytest.fail("it is told before"))
    path = recipe(tmp_path, checkpoint, RANDOM)
    out = tmp_path / "i.gguf"
    out.mkdir()
    with pytest.raises(UsageError, match="not a file"):
        make_imatrix(Choices(str(path)), out, None, QUIET)
    out.rmdir()
    write_imatrix(out, {"blk.0.ffn_up.weight": np.ones(64, np.float32)}, chunks=1, chunk_size=4)
    for content in (out.read_bytes(), b"my notes", b""):
        out.write_bytes(content)
        with pytest.raises(UsageError, match=r"another file.*importance matrix that tundish wrote"):
            make_imatrix(Choices(str(path)), out, None, QUIET)
        assert out.read_bytes() == content


def test_what_appears_meanwhile_stays(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, write = tmp_path / "i.gguf", write_imatrix

    def while_it_runs(path: Path, *arguments: Any, **names: Any) -> None:
        out.write_text("my notes")
        write(path, *arguments, **names)

    monkeypatch.setattr(importance_matrix, "write_imatrix", while_it_runs)
    with pytest.raises(UsageError, match="--out holds another file"):
        make_imatrix(Choices(str(recipe(tmp_path, checkpoint, RANDOM))), out, None, QUIET)
    assert out.read_text() == "my notes"
    assert {each.name for each in tmp_path.iterdir()} == {"i.gguf", "r.yaml"}


def test_nothing_is_left_of_one_that_failed(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, *arguments: object, **names: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(importance_matrix, "write_imatrix", broken)
    path = recipe(tmp_path, checkpoint, RANDOM)
    with pytest.raises(KeyboardInterrupt):
        make_imatrix(Choices(str(path)), tmp_path / "i.gguf", None, QUIET)
    assert [each.name for each in tmp_path.iterdir()] == ["r.yaml"]


def test_the_document_is_json(checkpoint: Path, tmp_path: Path) -> None:
    document = make_imatrix(Choices(str(recipe(tmp_path, checkpoint, RANDOM))), tmp_path / "i.dat", None, QUIET)
    assert json.loads(json.dumps(document))["calibration"] == {"source": "random-tokens", "seed": 0, "tokens": 32}
    assert (document["format"], document["file"]) == ("dat", str(tmp_path / "i.dat"))
