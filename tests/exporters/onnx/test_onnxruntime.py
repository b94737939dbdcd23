"""ONNX Runtime computes what the graph means: every variant, kind of scheme and provider's form of the graph."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")

from converters.errors import GateError  # noqa: E402
from exporters.base import Activations, Model  # noqa: E402
from exporters.onnx.exporter import EXPORTER  # noqa: E402
from exporters.onnx.names import DATA_FILE, MODEL_FILE  # noqa: E402
from exporters.onnx.runtime import NUMPY_OF_ORT  # noqa: E402
from exporters.options import ExecutionProvider, OnnxOptions  # noqa: E402
from tests.exporters.onnx.models import CONFIGS, ORIGINAL, graph_of, layout_of, write_artifact  # noqa: E402
from tests.exporters.oracle import canonical, divergences, random_ids, reference_logits  # noqa: E402
from tests.exporters.tiny_graphs import model_of  # noqa: E402

DML = OnnxOptions(execution_provider=ExecutionProvider.DML)
LENGTHS = (1, 9, 10, ORIGINAL, ORIGINAL + 1, 100)


def check(model: Model, folder: Path, options: OnnxOptions, kl: float) -> None:
    """The artifact passes onnx.checker, holds the canonical numbers and computes the interpreter's logits."""
    artifact = write_artifact(model, folder, options)
    onnx.checker.check_model(str(artifact / MODEL_FILE))
    graph = model.graph
    stored = dict(EXPORTER.read_back(artifact, model))
    matrices = {name: weight for name, weight in graph.weights.items() if len(weight.shape) == 2}
    assert stored.keys() == matrices.keys()
    for name, weight in matrices.items():
        assert np.array_equal(stored[name], canonical(weight)), name
    runtime = EXPORTER.open(artifact, options)
    for length in (each for each in LENGTHS if each <= model.context_length):
        ids = random_ids(graph, length)
        expected, found = reference_logits(graph, ids), runtime.logits(ids)
        assert found.shape == expected.shape
        assert found.dtype == np.float32
        assert divergences(expected, found).mean() < kl, f"length {length}"


@pytest.mark.parametrize("name", CONFIGS)
def test_float_variants(name: str, tmp_path: Path) -> None:
    check(model_of(graph_of(name)), tmp_path, OnnxOptions(), 1e-10)


@pytest.mark.parametrize(
    "scheme", ["fp16", "bf16", "int8_channel", "int8_g32", "int4_g32", "int4_g64", "int4_g128", "int4_asym_g32"]
)
def test_schemes_of_a_tied_model(scheme: str, tmp_path: Path) -> None:
    check(model_of(graph_of("llama3_tied", scheme)), tmp_path, OnnxOptions(), 1e-10)


@pytest.mark.parametrize("provider", [ExecutionProvider.CPU, ExecutionProvider.DML])
def test_roles_with_schemes_of_their_own(provider: ExecutionProvider, tmp_path: Path) -> None:
    overrides = {"attn_v": "int8_g32", "mlp_up": "fp16", "lm_head": "int8_g32", "embedding": "int4_asym_g32"}
    options = OnnxOptions(execution_provider=provider)
    check(model_of(graph_of("gqa", "int4_g32", **overrides)), tmp_path, options, 1e-4)


@pytest.mark.parametrize("scheme", ["fp16", "int8_channel", "int4_g32", "int4_g64", "int4_asym_g32"])
@pytest.mark.parametrize("name", ["longrope_long", "longrope_long_partial_tied"])
def test_directml_form(name: str, scheme: str, tmp_path: Path) -> None:
    check(model_of(graph_of(name, scheme)), tmp_path, DML, 1e-4)


@pytest.mark.parametrize("provider", [ExecutionProvider.CPU, ExecutionProvider.CUDA, ExecutionProvider.WEBGPU])
def test_fp16_activations(provider: ExecutionProvider, tmp_path: Path) -> None:
    options = OnnxOptions(execution_provider=provider, activations=Activations.FP16)
    graph = graph_of("longrope_long", "int4_g32", lm_head="fp16", attn_output="fp32")
    check(model_of(graph), tmp_path, options, 1e-4)


def test_accuracy_level_int8_is_close(tmp_path: Path) -> None:
    check(model_of(graph_of("gqa", "int4_g32")), tmp_path, OnnxOptions(accuracy_level=4), 2e-2)


def test_symmetric_zero_points_are_written_for_directml_alone(tmp_path: Path) -> None:
    model = model_of(graph_of("plain", "int4_g32"))
    for options, expected in ((DML, True), (OnnxOptions(), False)):
        loaded = onnx.load_from_string(layout_of(model, options).small[MODEL_FILE])
        matmuls = [node for node in loaded.graph.node if node.op_type == "MatMulNBits"]
        assert matmuls
        assert all((len(node.input) == 4) is expected for node in matmuls)


def test_a_tied_matrix_is_stored_once() -> None:
    tied, untied = (layout_of(model_of(graph_of(name, "int4_g32")), OnnxOptions()) for name in ("llama3_tied", "gqa"))
    config = CONFIGS["llama3_tied"]
    codes = config.vocab_size * config.hidden_size // 2
    assert sum(place.row_nbytes * config.vocab_size for place in tied.places["embedding"]) == codes + codes // 4
    assert "lm_head" in untied.places
    assert "lm_head" not in tied.places


def test_places_cover_the_data_file_without_overlap() -> None:
    model = model_of(graph_of("longrope_long", "int4_asym_g32"))
    layout = layout_of(model, OnnxOptions())
    big = layout.big[DATA_FILE]
    spans = [(offset, offset + len(data)) for offset, data in big.fixed]
    for name, places in layout.places.items():
        rows = model.graph.weights[name].shape[0]
        spans += [(place.offset, place.offset + rows * place.row_nbytes) for place in places]
    spans.sort()
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert spans[-1][1] == big.nbytes


def test_same_input_same_bytes(tmp_path: Path) -> None:
    model = model_of(graph_of("longrope_long", "int4_g32"))
    first, second = (write_artifact(model, tmp_path / name) for name in ("a", "b"))
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize("options", [OnnxOptions(), DML], ids=["rotated inside", "rotated before"])
@pytest.mark.parametrize("name", ["longrope", "longrope_long"])
def test_decoding_step_by_step_equals_one_pass(name: str, options: OnnxOptions, tmp_path: Path) -> None:
    """The cache: a chunk, tokens one by one and a second turn, past LongRoPE's original context where there is room."""
    import onnxruntime

    graph = graph_of(name)
    artifact = write_artifact(model_of(graph), tmp_path, options)
    session = onnxruntime.InferenceSession(str(artifact / MODEL_FILE), providers=["CPUExecutionProvider"])
    length = min(graph.config.context_length, ORIGINAL + 12)
    ids = np.array([random_ids(graph, length)], np.int64)
    positions = {"position_ids"} & {entry.name for entry in session.get_inputs()}
    caches = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), NUMPY_OF_ORT[entry.type])
        for entry in session.get_inputs()
        if entry.name.startswith("past")
    }
    names = [output.name for output in session.get_outputs()]
    parts = []
    for start, stop in ((0, 20), (20, ORIGINAL - 1), *((at, at + 1) for at in range(ORIGINAL - 1, length))):
        feeds = {"input_ids": ids[:, start:stop], "attention_mask": np.ones((1, stop), np.int64)} | caches
        feeds |= {name: np.arange(start, stop, dtype=np.int64)[None] for name in positions}
        results = dict(zip(names, session.run(names, feeds), strict=True))
        parts.append(results["logits"][0].astype(np.float32))
        caches = {name.replace("present", "past_key_values"): results[name] for name in names if name != "logits"}
    expected = reference_logits(graph, ids[0].tolist())
    assert divergences(expected, np.concatenate(parts)).max() < (1e-8 if options is not DML else 1e-3)


def test_bf16_activations_have_no_cpu_kernel(tmp_path: Path) -> None:
    options = OnnxOptions(execution_provider=ExecutionProvider.CUDA, activations=Activations.BF16)
    artifact = write_artifact(model_of(graph_of("plain", "bf16")), tmp_path, options)
    onnx.checker.check_model(str(artifact / MODEL_FILE))
    with pytest.raises(GateError, match="cannot open the model on the CPU"):
        EXPORTER.open(artifact, options).logits([1, 2])


def test_rows_of_inspect(tmp_path: Path) -> None:
    artifact = write_artifact(model_of(graph_of("plain", "int4_g32")), tmp_path)
    rows = {row.name: row for row in EXPORTER.tensors(artifact)}
    scales = rows["blocks.0.attn_q+attn_k+attn_v.scales"]
    assert (scales.file, scales.type, scales.shape, scales.nbytes) == (DATA_FILE, "FLOAT", (192, 4), 192 * 4 * 4)
    assert "CPUExecutionProvider" in EXPORTER.devices()


@pytest.mark.parametrize("options", [OnnxOptions(), DML], ids=["rotated inside", "rotated before"])
@pytest.mark.parametrize("name", ["longrope", "longrope_long"])
def test_the_rotary_cache_has_a_row_a_position(name: str, options: OnnxOptions) -> None:
    model = model_of(graph_of(name))
    layout = layout_of(model, options)
    row = 8 * (4 if options is not DML else 2) * 2  # cos and sin of 8 pairs
    assert sum(len(data) for _, data in layout.big[DATA_FILE].fixed) == model.context_length * row
    kinds = {node.op_type for node in onnx.load_from_string(layout.small[MODEL_FILE]).graph.node}
    assert not kinds & {"If", "ReduceMax", "Slice", "Greater", "GreaterOrEqual"}
