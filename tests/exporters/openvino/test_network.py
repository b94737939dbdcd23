"""The network in the OpenVINO runtime against the interpreter, on tiny random models of every variant."""

from __future__ import annotations

import resource
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

ov = pytest.importorskip("openvino")
genai = pytest.importorskip("openvino_genai")

from converters.errors import ResourceError  # noqa: E402
from converters.quantize.rtn import quantize_rtn  # noqa: E402
from converters.quantize.scheme import scheme_named  # noqa: E402
from converters.role import Role  # noqa: E402
from exporters.base import Activations, Model  # noqa: E402
from exporters.openvino.exporter import BIN, EXPORTER, XML, network_layout  # noqa: E402
from exporters.openvino.ir import ZeroConstants, _xml  # noqa: E402
from exporters.openvino.lower import decompress  # noqa: E402
from exporters.openvino.runtime import EXACT  # noqa: E402
from exporters.openvino.storage import Matrix, Stored, plan_matrices  # noqa: E402
from exporters.options import OpenvinoOptions  # noqa: E402
from tests.converters.tiny_models import ORIGINAL_CONTEXT, VARIANTS  # noqa: E402
from tests.exporters.openvino.artifacts import compile_network, step, write_artifact, write_network  # noqa: E402
from tests.exporters.oracle import canonical, random_ids, reference_logits  # noqa: E402
from tests.exporters.tiny_checkpoints import make_model  # noqa: E402

INTEGER_SCHEMES = ("int4_g32", "int4_asym_g32", "int8_g32", "int8_channel")


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_logits_equal_the_interpreters(name, tmp_path):
    model = make_model(name, tmp_path)
    runtime = EXPORTER.open(write_network(model, tmp_path), OpenvinoOptions())
    for length in VARIANTS[name].lengths:
        ids = random_ids(model.graph, length)
        assert np.abs(runtime.logits(ids) - reference_logits(model.graph, ids)).max() < 1e-4, length


@pytest.mark.parametrize("scheme", ["fp16", "bf16", *INTEGER_SCHEMES])
def test_stored_weights_are_the_canonical_ones(scheme, tmp_path):
    model = make_model("phi4_mini", tmp_path, scheme)
    folder = write_network(model, tmp_path)
    ids = random_ids(model.graph, 20)
    found = EXPORTER.open(folder, OpenvinoOptions()).logits(ids)
    assert np.abs(found - reference_logits(model.graph, ids)).max() < 1e-4
    read = dict(EXPORTER.read_back(folder, model))
    matrices = {name: weight for name, weight in model.graph.weights.items() if weight.role is not Role.NORM}
    assert read.keys() == matrices.keys()
    for name, weight in matrices.items():
        assert np.array_equal(read[name], canonical(weight)), name


def test_stacked_weights_of_different_schemes_are_stored_apart(tmp_path):
    overrides = {Role.ATTN_V: "int8_g32", Role.MLP_UP: "fp16", Role.LM_HEAD: "int8_channel"}
    model = make_model("llama3", tmp_path, "int4_g32", overrides)
    names = [matrix.name for matrix in plan_matrices(model.graph)]
    assert "blocks.0.attn_v" in names
    assert "blocks.0.qkv" not in names
    ids = random_ids(model.graph, 12)
    folder = write_network(model, tmp_path)
    found = EXPORTER.open(folder, OpenvinoOptions()).logits(ids)
    assert np.abs(found - reference_logits(model.graph, ids)).max() < 1e-4
    for name, values in EXPORTER.read_back(folder, model):
        assert np.array_equal(values, canonical(model.graph.weights[name])), name


@pytest.mark.parametrize(
    ("groups", "scheme"), [(2, "int4_g32"), (3, "int4_asym_g32"), (1, "int8_channel"), (3, "int8_g32")]
)
def test_the_plugin_computes_with_exactly_the_canonical_numbers(groups, scheme):
    """The identity through a compressed MatMul gives back the matrix, bit for bit."""
    rng = np.random.default_rng(groups)
    width = 32 * groups
    matrix = Matrix("m", ("m",), (48,), width, scheme_named(scheme))
    shape = (48, width)
    tensor = quantize_rtn(rng.normal(size=shape).astype(np.float32), matrix.scheme)
    kept = []

    def constant(part: Stored):
        value = ov.Tensor(part.pack(tensor), ov.Shape(part.shape), getattr(ov.Type, part.type))
        kept.append(value)
        return ov.op.Constant(value, shared_memory=False).output(0)

    x = ov.opset15.parameter([-1, width], ov.Type.f32)
    product = ov.opset15.matmul(x, decompress(matrix, constant), False, True)
    compiled = ov.Core().compile_model(ov.Model([product], [x], "m"), "CPU", dict(EXACT))
    assert _precisions(compiled)["FullyConnected", matrix.constants()["codes"].type] == 1
    assert np.array_equal(compiled([np.eye(width, dtype=np.float32)])[0].T, tensor.dequantize())


def _precisions(compiled) -> Counter[tuple[str, str]]:
    """How often the CPU plugin runs each kind of layer, by the precision of its weights."""
    infos = (node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops())
    return Counter((str(info["layerType"].value), str(info["runtimePrecision"].value)) for info in infos)


@pytest.mark.parametrize(("scheme", "kind"), [("int4_g32", "i4"), ("int4_asym_g32", "u4"), ("int8_channel", "i8")])
def test_the_cpu_plugin_keeps_weights_compressed_and_fuses_the_blocks(scheme, kind, tmp_path):
    model = make_model("phi4_mini", tmp_path, scheme)
    layers = _precisions(compile_network(write_network(model, tmp_path)))
    blocks = model.graph.config.num_layers
    assert {key: count for key, count in layers.items() if key[0] == "FullyConnected"} == {
        ("FullyConnected", kind): 4 * blocks + 1
    }
    assert layers["Gather", kind] == 1
    kinds = Counter[str]()
    for (layer, _), count in layers.items():
        kinds[layer] += count
    assert kinds["RMS"] == 2 * blocks + 1
    assert kinds["RoPE"] == 2 * blocks
    assert kinds["ScaledDotProductAttention"] == blocks
    assert kinds["Softmax"] == 0


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("phi3_medium_gqa", ORIGINAL_CONTEXT),
        ("phi3_medium_gqa", None),
        ("phi3_window", None),
        ("llama3_2", None),
        ("mistral", None),
    ],
)
def test_decoding_step_by_step_equals_prefill(name, context, tmp_path):
    model = make_model(name, tmp_path, context=context)
    ids = random_ids(model.graph, ORIGINAL_CONTEXT + 8)  # beyond LongRoPE's original context, and the windows
    request = compile_network(write_network(model, tmp_path)).create_infer_request()
    parts = [step(request, [ids[:20]], 0)] + [step(request, [[ids[at]]], at) for at in range(20, len(ids))]
    assert np.abs(np.concatenate(parts, axis=1)[0] - reference_logits(model.graph, ids)).max() < 1e-4


@pytest.mark.parametrize("name", ["phi4_mini", "phi3_window"])
def test_a_padded_row_of_a_batch_is_computed_like_alone(name, tmp_path):
    model = make_model(name, tmp_path)
    short, long = random_ids(model.graph, 13), random_ids(model.graph, 18)
    request = compile_network(write_network(model, tmp_path)).create_infer_request()
    rows = [[0] * 5 + short, long]
    prefill = step(request, [row[:16] for row in rows], 0, masked=5)
    tail = step(request, [row[16:] for row in rows], 16, masked=5)
    found = np.concatenate([prefill, tail], axis=1)
    assert np.abs(found[0, 5:] - reference_logits(model.graph, short)).max() < 1e-4
    assert np.abs(found[1] - reference_logits(model.graph, long)).max() < 1e-4


@pytest.mark.parametrize(
    ("activations", "cache"), [(Activations.FP32, "f32"), (Activations.FP16, "f16"), (Activations.BF16, "bf16")]
)
def test_runtime_options_reach_the_plugin(activations, cache, tmp_path):
    model = make_model("phi4", tmp_path, "int4_g32")
    folder = write_network(model, tmp_path, OpenvinoOptions(activations=activations))
    compiled = ov.Core().compile_model(folder / XML, "CPU")
    assert compiled.get_property("KV_CACHE_PRECISION") == getattr(ov.Type, cache)
    exact = compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    assert exact == (activations is Activations.FP32)


def test_layouts_do_not_depend_on_what_the_process_did_before(tmp_path):
    model = make_model("phi4_mini", tmp_path, "int4_asym_g32")
    first = network_layout(model, OpenvinoOptions())
    second = network_layout(replace(model), OpenvinoOptions())
    assert first.small == second.small
    assert first.big == second.big
    offsets = [
        [(place.offset, place.row_nbytes) for places in layout.places.values() for place in places]
        for layout in (first, second)
    ]
    assert offsets[0] == offsets[1]


def test_constants_do_not_overlap_and_fill_the_file(tmp_path):
    model = make_model("llama3_2", tmp_path, "int4_asym_g32", {Role.ATTN_V: "fp16"})
    layout = network_layout(model, OpenvinoOptions())
    spans = [(offset, offset + len(data)) for offset, data in layout.big[BIN].fixed]
    for name, places in layout.places.items():
        rows = model.graph.weights[name].shape[0]
        spans += [(place.offset, place.offset + rows * place.row_nbytes) for place in places]
    spans.sort()
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert spans[-1][1] <= layout.big[BIN].nbytes < spans[-1][1] + 64


def test_zero_constants_share_memory():
    parts = [Stored(f"p{i}", "u8", (1 << 20,), lambda tensor: np.zeros(0, np.uint8)) for i in range(3)]
    constants = ZeroConstants(parts)
    addresses = {constants(part).get_node().data.ctypes.data for part in parts}
    assert len(addresses) == 1


def test_a_failure_to_write_the_xml_harms_nothing_else(tmp_path, monkeypatch):
    null = tmp_path / "null"
    null.touch()
    monkeypatch.setattr("os.devnull", str(null))
    parameter = ov.opset13.parameter([1], np.float32, name="p")
    network = ov.Model([ov.opset13.add(parameter, np.ones(1, np.float32))], [parameter], "network")
    assert "<net" in _xml(network)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ResourceError, match="TMPDIR"):
            _xml(network)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert null.exists()


@pytest.mark.parametrize("backend", ["PA", "SDPA"])
@pytest.mark.parametrize(
    ("name", "length"), [("phi3_window", 20), ("mistral", 20), ("phi3_medium_gqa", 60), ("llama3_1", 40)]
)
def test_the_pipeline_generates_what_the_interpreter_would(name, length, backend, whole_artifacts):
    """Paged attention replaces mask and cache on load: windows must survive that."""
    model, folder = whole_artifacts(name)
    pipeline = genai.LLMPipeline(folder, "CPU", ATTENTION_BACKEND=backend, **EXACT)
    prompt = random_ids(model.graph, length)
    inputs = genai.TokenizedInputs(ov.Tensor(np.array([prompt], np.int64)), ov.Tensor(np.ones((1, length), np.int64)))
    settings = genai.GenerationConfig(max_new_tokens=8, do_sample=False, ignore_eos=True)
    (found,) = pipeline.generate(inputs, settings).tokens
    ids = list(prompt)
    for _ in range(8):
        ids.append(int(reference_logits(model.graph, ids)[-1].argmax()))
    assert found == ids[length:]


@pytest.fixture(scope="module")
def whole_artifacts(tmp_path_factory):
    made: dict[str, tuple[Model, Path]] = {}

    def make(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = make_model(name, folder)
            made[name] = model, write_artifact(model, folder)
        return made[name]

    return make
