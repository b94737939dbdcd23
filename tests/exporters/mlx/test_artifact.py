"""Artifacts opened by mlx and mlx-lm: the numbers they hold, and the numbers they compute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")

from converters.role import Role  # noqa: E402
from exporters.base import Activations, Model  # noqa: E402
from exporters.mlx import exporter as exporter_module  # noqa: E402
from exporters.mlx.exporter import EXPORTER  # noqa: E402
from exporters.mlx.runtime import MlxRuntime  # noqa: E402
from exporters.options import MlxOptions  # noqa: E402
from tests.converters.tiny_models import VARIANTS  # noqa: E402
from tests.exporters.mlx.artifacts import export  # noqa: E402
from tests.exporters.oracle import canonical, random_ids, reference_logits  # noqa: E402
from tests.exporters.tiny_checkpoints import make_model  # noqa: E402

FP32 = MlxOptions(activations=Activations.FP32)


def context_of(name: str) -> int | None:
    """The longest context that mlx-lm computes as the model does: it ignores windows. None for the model's own."""
    settings = VARIANTS[name].settings
    window = settings.get("sliding_window", VARIANTS[name].config_class().sliding_window if name == "mistral" else None)
    return window if isinstance(window, int) and window < 1000 else None


def assert_same_logits(model: Model, folder: Path, lengths: tuple[int, ...], tolerance: float) -> None:
    runtime = EXPORTER.open(folder, FP32)
    for length in lengths:
        ids = random_ids(model.graph, length)
        found, expected = runtime.logits(ids), reference_logits(model.graph, ids)
        assert found.dtype == np.float32
        assert np.abs(expected).max() > 1, "logits too small to prove anything"
        assert np.abs(found - expected).max() <= tolerance, f"{length} tokens"


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_every_variant(name: str, tmp_path: Path) -> None:
    context = context_of(name)
    model = make_model(name, tmp_path, context=context)
    folder = export(model, tmp_path / "out", FP32)
    assert_same_logits(model, folder, (3, min(context or 60, 60)), 2e-4)


@pytest.mark.parametrize("context", [32, 128])
def test_a_cache_that_grows_past_the_original_context(context: int, tmp_path: Path) -> None:
    model = make_model("phi4_mini", tmp_path, context=context)
    network = mlx_lm.load(str(export(model, tmp_path / "out", FP32)))[0]
    ids, cache = random_ids(model.graph, 40), mlx_lm.models.cache.make_prompt_cache(network)
    parts = [ids[:20], ids[20:29], *([each] for each in ids[29:])]
    found = np.concatenate([np.array(network(mx.array([part]), cache=cache))[0] for part in parts])
    assert np.abs(found - reference_logits(model.graph, ids)).max() <= 2e-4


SCHEMES = ("int4_g32", "int4_g64", "int4_asym_g32", "int8_g32", "int8_channel", "fp16")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["phi4_mini", "llama3"])
def test_quantized_weights_and_logits(name: str, scheme: str, tmp_path: Path) -> None:
    overrides = {Role.MLP_DOWN: "int8_g32"} if scheme == "int4_g32" else {}
    model = make_model(name, tmp_path, scheme, overrides, context=32)
    folder = export(model, tmp_path / "out", FP32)
    read = dict(EXPORTER.read_back(folder, model))
    matrices = {name for name, weight in model.graph.weights.items() if weight.role is not Role.NORM}
    assert read.keys() == matrices
    for each in matrices:
        assert np.array_equal(read[each], canonical(model.graph.weights[each])), each
    assert_same_logits(model, folder, (32,), 2e-4)


def test_fp16_activations_hold_the_same_weights(tmp_path: Path) -> None:
    model = make_model("phi4_mini", tmp_path, "int4_asym_g32", context=32)
    folder = export(model, tmp_path / "out")
    arrays = mx.load(str(folder / "model.safetensors"))
    assert {str(array.dtype) for array in arrays.values()} == {"mlx.core.uint32", "mlx.core.float16"}
    for name, values in EXPORTER.read_back(folder, model):
        assert np.array_equal(values, canonical(model.graph.weights[name])), name
    # The norms were rounded to fp16 and nothing else.
    assert_same_logits(model, folder, (32,), 0.05)


@pytest.mark.parametrize("activations", Activations)
def test_activations_are_computed_in_the_type_asked_for(activations: Activations, tmp_path: Path) -> None:
    model = make_model("phi3_mini_128k", tmp_path, activations.value, context=32)
    folder = export(model, tmp_path / "out", MlxOptions(activations=activations))
    network = mlx_lm.load(str(folder))[0]
    assert (
        network(mx.array([[1, 2]])).dtype == {"fp32": mx.float32, "fp16": mx.float16, "bf16": mx.bfloat16}[activations]
    )


@pytest.mark.parametrize(("activations", "dtype"), [(None, mx.float16), (Activations.FP32, mx.float32)])
def test_quantized_models_compute_in_the_type_asked_for(
    activations: Activations | None, dtype: object, tmp_path: Path
) -> None:
    model = make_model("phi4_mini", tmp_path, "int4_g32", context=32)
    network = mlx_lm.load(str(export(model, tmp_path / "out", MlxOptions(activations=activations))))[0]
    assert network(mx.array([[1, 2]])).dtype == dtype


def test_a_sharded_artifact_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("phi4", tmp_path, "int4_g32")
    whole = export(model, tmp_path / "whole")
    monkeypatch.setattr(exporter_module, "SHARD_NBYTES", 8000)
    folder = export(model, tmp_path / "out")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == {path.name for path in folder.glob("*.safetensors")} and len(files) > 3
    ids = random_ids(model.graph, 4)
    assert np.array_equal(EXPORTER.open(folder, FP32).logits(ids), EXPORTER.open(whole, FP32).logits(ids))


def test_the_file_is_what_safetensors_expects(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    folder = export(make_model("phi4_mini", tmp_path, "int4_g32", context=32), tmp_path / "out")
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "mlx"}
        assert file.get_tensor("model.layers.0.self_attn.qkv_proj.weight").shape == (128, 8)
        assert file.get_tensor("model.norm.weight").dtype == np.float16
    rows = {row.name: row for row in EXPORTER.tensors(folder)}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: row.file for name, row in sorted(rows.items())}
    assert index["metadata"]["total_size"] == sum(row.nbytes for row in rows.values())


def test_tokens_and_answer(tmp_path: Path) -> None:
    model = make_model("llama2", tmp_path)
    folder = export(model, tmp_path / "out", FP32)
    runtime = MlxRuntime(folder)
    text = "<|im_start|>Hi"
    assert runtime.tokenize(text)[0] == next(
        i for i, t in enumerate(model.tokenizer.tokens) if t.text == "<|im_start|>"
    )
    logits = runtime.logits([5])
    runtime._tokenizer.encode = lambda *_, **__: [5]  # a prompt inside the tiny model's vocabulary
    answer = runtime.answer(text, 3)
    assert answer.token_ids[0] == logits[-1].argmax() and len(answer.token_ids) == 3 and not answer.stopped


def test_the_answer_ends_with_the_stop_token(tmp_path: Path) -> None:
    model = make_model("llama2", tmp_path)
    first = int(EXPORTER.open(export(model, tmp_path / "free", FP32), FP32).logits([5])[-1].argmax())
    config = replace(model.graph.config, eos_token_ids=(2, first))
    model = replace(model, graph=replace(model.graph, config=config))
    runtime = MlxRuntime(export(model, tmp_path / "out", FP32))
    runtime._tokenizer.encode = lambda *_, **__: [5]
    answer = runtime.answer("x", 9)
    assert answer.stopped and answer.token_ids == (first,)
