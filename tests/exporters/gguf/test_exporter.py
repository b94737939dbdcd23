"""The file without the runtime: layout, tensor table, metadata, reading back."""

from __future__ import annotations

import itertools
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType
from gguf.constants import MODEL_ARCH, MODEL_TENSORS, TENSOR_NAMES

from converters.errors import GateError
from converters.passes.assign import assign_schemes
from converters.quantize.ggml.mixes import MIXES
from converters.quantize.scheme import SCHEMES, scheme_named
from converters.role import Role
from exporters.gguf.exporter import EXPORTER, FILE
from exporters.gguf.modelfile import MODELFILE
from tests.exporters.gguf.models import CONFIGS, ORIGINAL, WIDE_CONFIGS, layout_of, write_artifact
from tests.exporters.oracle import canonical
from tests.exporters.tiny_graphs import BASE, longrope, model_of, random_graph

OPTIONS = EXPORTER.options()


def reader(folder: Path) -> GGUFReader:
    return GGUFReader(folder / FILE)


def value_of(file: GGUFReader, key: str) -> object:
    return file.fields[key].contents()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["phi3_gqa_tied", "mistral_wide_heads", "llama_wide_gqa"])
def test_read_back_gives_the_canonical_matrices(scheme: str, name: str, tmp_path: Path) -> None:
    graph = assign_schemes(random_graph((CONFIGS | WIDE_CONFIGS)[name]), scheme_named(scheme), {})
    model = model_of(graph)
    artifact = write_artifact(model, tmp_path)
    found = dict(EXPORTER.read_back(artifact, model))
    assert set(found) == {name for name, weight in graph.weights.items() if len(weight.shape) == 2}
    for weight, rows in found.items():
        assert np.array_equal(rows, canonical(graph.weights[weight])), weight


def test_read_back_names_a_missing_tensor(tmp_path: Path) -> None:
    artifact = write_artifact(model_of(random_graph(CONFIGS["phi3_gqa_tied"])), tmp_path)
    untied = model_of(random_graph(replace(CONFIGS["phi3_gqa_tied"], tie_embeddings=False)))
    with pytest.raises(GateError, match=r"output\.weight"):
        list(EXPORTER.read_back(artifact, untied))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layout_covers_every_byte_once(name: str) -> None:
    graph = assign_schemes(random_graph(CONFIGS[name]), scheme_named("int4_g32"), {Role.ATTN_K: scheme_named("fp16")})
    layout = layout_of(model_of(graph))
    assert set(layout.places) == set(graph.weights)
    assert list(layout.big) == [FILE] and list(layout.small) == [MODELFILE]
    spans = [(offset, offset + len(data)) for offset, data in layout.big[FILE].fixed]
    for weight, places in layout.places.items():
        (place,) = places
        spans.append((place.offset, place.offset + graph.weights[weight].shape[0] * place.row_nbytes))
    spans.sort()
    assert spans[0][0] == 0 and spans[-1][1] <= layout.big[FILE].nbytes < spans[-1][1] + 32
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert end <= start < end + 32


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_are_those_of_the_architecture(name: str, tmp_path: Path) -> None:
    graph = random_graph(CONFIGS[name])
    artifact = write_artifact(model_of(graph), tmp_path)
    file = reader(artifact)
    arch = MODEL_ARCH.PHI3 if graph.config.family == "phi3" else MODEL_ARCH.LLAMA
    known = {
        TENSOR_NAMES[tensor].format(bid=layer) + ".weight"
        for tensor in MODEL_TENSORS[arch]
        for layer in range(graph.config.num_layers)
    }
    names = [tensor.name for tensor in file.tensors]
    assert set(names) <= known
    assert ("output.weight" in names) != graph.config.tie_embeddings
    assert sum(math.prod(tensor.shape) for tensor in file.tensors if "rope" not in tensor.name) == sum(
        math.prod(weight.shape) for weight in graph.weights.values()
    )
    assert all(tensor.data_offset % 32 == 0 for tensor in file.tensors)


def test_metadata_of_a_longrope_model(tmp_path: Path) -> None:
    graph = assign_schemes(
        random_graph(CONFIGS["phi3_longrope"]), scheme_named("int4_g32"), {Role.EMBEDDING: scheme_named("int8_g32")}
    )
    sampling = {"do_sample": True, "temperature": 0.5, "top_k": 40, "top_p": 0.875}
    model = model_of(graph, name="Tiny-instruct", licence="MIT", context_length=512, sampling=sampling)
    artifact = write_artifact(model, tmp_path)
    file = reader(artifact)
    expected = {
        "general.architecture": "phi3",
        "general.type": "model",
        "general.name": "Tiny-instruct",
        "general.license": "MIT",
        "general.file_type": LlamaFileType.MOSTLY_Q4_0,
        "general.quantization_version": 2,
        "general.sampling.top_k": 40,
        "general.sampling.top_p": 0.875,
        "general.sampling.temp": 0.5,
        "phi3.vocab_size": 320,
        "phi3.context_length": 512,
        "phi3.embedding_length": 64,
        "phi3.block_count": 2,
        "phi3.feed_forward_length": 96,
        "phi3.attention.head_count": 4,
        "phi3.attention.head_count_kv": 4,
        "phi3.attention.sliding_window": 0,
        "phi3.rope.dimension_count": 12,
        "phi3.rope.freq_base": 10000.0,
        "phi3.rope.scaling.type": "longrope",
        "phi3.rope.scaling.original_context_length": 256,
        "phi3.rope.scaling.attn_factor": pytest.approx(1.19),
        "tokenizer.ggml.model": "llama",
    }
    assert {key: value_of(file, key) for key in expected} == expected
    types = {tensor.name: tensor.tensor_type for tensor in file.tensors}
    assert types["token_embd.weight"] == GGMLQuantizationType.Q8_0
    assert types["blk.0.attn_qkv.weight"] == GGMLQuantizationType.Q4_0
    assert types["blk.0.attn_norm.weight"] == GGMLQuantizationType.F32
    factors = {tensor.name: tensor.data.tolist() for tensor in file.tensors if "rope" in tensor.name}
    chosen = np.array(longrope(ORIGINAL, 12).long_factors, np.float32).tolist()
    assert factors == {"rope_factors_long.weight": chosen, "rope_factors_short.weight": chosen}


def test_a_mix_names_the_file_type_and_inspection_shows_the_types(tmp_path: Path) -> None:
    graph = assign_schemes(random_graph(WIDE_CONFIGS["phi3_wide_tied"]), MIXES["q4_k_m"], {})
    artifact = write_artifact(model_of(graph, mix="q4_k_m"), tmp_path)
    assert value_of(reader(artifact), "general.file_type") == LlamaFileType.MOSTLY_Q4_K_M
    types = {row.name: row.type for row in EXPORTER.tensors(artifact)}
    assert types["token_embd.weight"] == types["blk.1.attn_qkv.weight"] == "Q6_K"
    assert types["blk.0.attn_qkv.weight"] == types["blk.0.ffn_up.weight"] == "Q4_K"


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_has_a_file_type_and_a_layout(mix: str) -> None:
    graph = assign_schemes(random_graph(WIDE_CONFIGS["phi3_wide"]), MIXES[mix], {})
    assert layout_of(model_of(graph, mix=mix)).nbytes > 0


def test_parts_of_a_fused_tensor_may_come_from_different_quantizers(tmp_path: Path) -> None:
    overrides = {Role.MLP_UP: scheme_named("q4_0"), Role.ATTN_K: scheme_named("q4_0")}
    graph = assign_schemes(random_graph(BASE), scheme_named("int4_g32"), overrides)
    model = model_of(graph)
    artifact = write_artifact(model, tmp_path)
    types = {row.name: row.type for row in EXPORTER.tensors(artifact)}
    assert types["blk.0.ffn_up.weight"] == types["blk.0.attn_qkv.weight"] == "Q4_0"
    for weight, rows in EXPORTER.read_back(artifact, model):
        assert np.array_equal(rows, canonical(graph.weights[weight])), weight


def test_a_model_published_as_greedy_has_no_sampling_defaults(tmp_path: Path) -> None:
    model = model_of(random_graph(BASE), sampling={"do_sample": False, "temperature": 0.5})
    artifact = write_artifact(model, tmp_path)
    assert not [key for key in reader(artifact).fields if key.startswith("general.sampling")]


def test_a_window_is_stated_for_phi3(tmp_path: Path) -> None:
    artifact = write_artifact(model_of(random_graph(replace(BASE, sliding_window=2047))), tmp_path)
    assert value_of(reader(artifact), "phi3.attention.sliding_window") == 2047


def test_planning_writes_no_temporary_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = model_of(random_graph(CONFIGS["phi3"]))
    expected = layout_of(model).big[FILE].fixed
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    assert layout_of(model).big[FILE].fixed == expected
