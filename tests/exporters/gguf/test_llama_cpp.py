"""llama.cpp itself computes what the graph means: tiny models of every variant, and how errors reach the user."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("xllamacpp")

from converters.errors import GateError, ModelError, UsageError
from converters.graph import Graph
from converters.interpret import interpret
from converters.passes.assign import assign_schemes
from converters.quantize.ggml.mixes import MIXES
from converters.quantize.scheme import FP32, SCHEMES, NumberType, scheme_named
from converters.quantize.tensor import F32
from converters.role import Role
from exporters.base import Semantics
from exporters.gguf.context import CONTEXT_MULTIPLE, allocated_context
from exporters.gguf.exporter import EXPORTER, FILE
from exporters.gguf.runtime import BATCH, LlamaCpp
from tests.exporters.gguf.models import CONFIGS, ORIGINAL, WIDE_CONFIGS, write_artifact
from tests.exporters.oracle import canonical, divergences
from tests.exporters.tiny_graphs import BASE, model_of, random_graph

OPTIONS = EXPORTER.options()


def divergence(expected: F32, found: F32) -> float:
    """The largest KL divergence of any position, in nats."""
    return float(divergences(expected, found).max())


def token_ids(length: int) -> NDArray[np.int64]:
    return np.random.default_rng(length).integers(3, 259, (1, length))


def opened(graph: Graph, folder: Path) -> LlamaCpp:
    artifact = write_artifact(model_of(graph), folder)
    return LlamaCpp(artifact / FILE)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_interpreter(name: str, tmp_path: Path) -> None:
    graph = random_graph(CONFIGS[name])
    runtime = opened(graph, tmp_path)
    for length in (1, 40, 250):
        ids = token_ids(length)
        expected = interpret(graph, ids)[0]
        assert np.ptp(expected) > 2, "logits too flat to prove anything"
        found = runtime.logits(ids[0].tolist())
        assert found.shape == expected.shape
        assert divergence(expected, found) < 1e-6, f"length {length}"


def test_logits_of_a_sequence_longer_than_a_batch(tmp_path: Path) -> None:
    graph = random_graph(BASE)
    runtime = opened(graph, tmp_path)
    ids = token_ids(BATCH + 70)
    assert divergence(interpret(graph, ids)[0], runtime.logits(ids[0].tolist())) < 1e-6


@pytest.mark.parametrize("name", ["phi3_longrope", "phi3_longrope_long"])
def test_the_allocated_context_does_not_choose_longropes_factors(name: str, tmp_path: Path) -> None:
    """Users let llama.cpp allocate what they like, and go on past the original context."""
    graph = random_graph(CONFIGS[name])
    runtime = opened(graph, tmp_path)
    for length in (20, ORIGINAL + 20):
        ids = token_ids(length)
        expected = interpret(graph, ids)[0]
        assert divergence(expected, runtime.logits(ids[0].tolist())) < 1e-6
    runtime._begin(length)
    for start, stop in ((0, ORIGINAL - 2), *((at, at + 1) for at in range(ORIGINAL - 2, length))):
        runtime._decode(ids[0, start:stop].tolist(), every=False)
        found = np.ctypeslib.as_array(runtime._c.llama_get_logits_ith(runtime._context, -1), (runtime._vocab_size,))
        assert divergence(expected[stop - 1 : stop], found[None]) < 1e-6, stop


def test_llama_cpp_rounds_its_context_up(tmp_path: Path) -> None:
    runtime = opened(random_graph(BASE), tmp_path)
    params = runtime._lib.context_params()
    params.n_ctx = CONTEXT_MULTIPLE + 1
    context = runtime._c.llama_init_from_model(runtime._model, params)
    assert runtime._c.llama_n_ctx(context) == allocated_context(CONTEXT_MULTIPLE + 1) == 2 * CONTEXT_MULTIPLE


@pytest.mark.parametrize("scheme", ["fp16", "bf16", "int8_g32", "int8_channel", "int4_g32", "int4_asym_g32"])
@pytest.mark.parametrize("name", ["phi3_gqa_tied", "llama_gqa_llama3_tied"])
def test_quantized_artifacts_compute_with_the_stored_numbers(scheme: str, name: str, tmp_path: Path) -> None:
    graph = assign_schemes(random_graph(CONFIGS[name]), scheme_named(scheme), {})
    runtime = opened(graph, tmp_path)
    ids = token_ids(40)
    expected = interpret(graph, ids, canonical)[0]
    # llama.cpp rounds activations to the type that its kernels multiply with: fp16, bf16, or int8 in groups of 32.
    limit = {"fp16": 1e-4, "bf16": 5e-3}.get(scheme, 2e-2)
    assert divergence(expected, runtime.logits(ids[0].tolist())) < limit


@pytest.mark.parametrize("scheme", [name for name, each in SCHEMES.items() if each.type is NumberType.GGML])
@pytest.mark.parametrize("name", ["phi3_wide", "llama_wide_gqa"])
def test_blocks_of_llama_cpps_own_types_compute_with_the_stored_numbers(scheme: str, name: str, tmp_path: Path) -> None:
    graph = assign_schemes(random_graph(WIDE_CONFIGS[name]), scheme_named(scheme), {})
    assert {w.scheme.name for w in graph.weights.values() if w.role is not Role.NORM} == {scheme}
    runtime = opened(graph, tmp_path)
    ids = token_ids(40)
    found = runtime.logits(ids[0].tolist())
    # llama.cpp rounds activations to int8 in groups of 32 or, for blocks of 256, in groups of 256.
    assert divergence(interpret(graph, ids, canonical)[0], found) < 4e-2
    assert np.mean(divergences(interpret(graph, ids)[0], found)) > np.mean(
        divergences(interpret(graph, ids, canonical)[0], found)
    )


@pytest.mark.parametrize("mix", ["q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "iq4_xs"])
def test_mixes_compute_with_the_stored_numbers(mix: str, tmp_path: Path) -> None:
    graph = assign_schemes(random_graph(WIDE_CONFIGS["phi3_wide_tied"]), MIXES[mix], {})
    runtime = opened(graph, tmp_path)
    ids = token_ids(40)
    assert divergence(interpret(graph, ids, canonical)[0], runtime.logits(ids[0].tolist())) < 4e-2


def test_q_k_v_of_different_schemes_are_stored_apart(tmp_path: Path) -> None:
    graph = random_graph(CONFIGS["phi3_longrope"])
    value = scheme_named("fp16")
    mixed = graph.map_weights(lambda w: replace(w, scheme=value) if w.role is Role.ATTN_V else w)
    runtime = opened(mixed, tmp_path)
    ids = token_ids(40)
    assert divergence(interpret(graph, ids)[0], runtime.logits(ids[0].tolist())) < 1e-4


def test_gate_and_up_of_different_schemes_are_refused() -> None:
    graph = assign_schemes(random_graph(BASE), FP32, {Role.MLP_UP: scheme_named("fp16")})
    with pytest.raises(UsageError, match=r"blk\.0\.ffn_up.*blocks\.0\.mlp_gate.*fp32, fp16"):
        EXPORTER.check(model_of(graph), OPTIONS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(BASE, head_dim=32, rope=replace(BASE.rope, dim=32)), "heads span the hidden size"),
        (replace(CONFIGS["llama"], rope=replace(BASE.rope, dim=12)), "all of a head is rotated"),
    ],
)
def test_shapes_that_llama_cpp_cannot_run_are_refused(config: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        EXPORTER.check(model_of(random_graph(config)), OPTIONS)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["phi3", "mistral_wide_heads"])
def test_sliding_window_is_ignored_as_semantics_says(name: str, tmp_path: Path) -> None:
    full = random_graph(CONFIGS[name])
    windowed = random_graph(replace(CONFIGS[name], sliding_window=20))
    model = model_of(windowed)
    semantics = EXPORTER.semantics(model, OPTIONS)
    assert "ignores the model's sliding window of 20" in semantics.sentence
    assert semantics.exact_to == 20
    runtime = opened(windowed, tmp_path)
    ids = token_ids(60)
    assert divergence(interpret(full, ids)[0], runtime.logits(ids[0].tolist())) < 1e-6
    assert divergence(interpret(windowed, ids)[0], runtime.logits(ids[0].tolist())) > 1e-3
    ids = ids[:, : semantics.exact_to]
    assert divergence(interpret(windowed, ids)[0], runtime.logits(ids[0].tolist())) < 1e-6


def test_semantics_of_a_model_without_surprises() -> None:
    assert EXPORTER.semantics(model_of(random_graph(BASE)), OPTIONS) == Semantics("The context is 1024 tokens.", 1024)


def test_tokenize_and_answer(tmp_path: Path) -> None:
    graph = random_graph(BASE, seed=3)
    runtime = opened(graph, tmp_path)
    assert runtime.tokenize("<s>A</s>") == [1, 1, 3 + ord("A"), 2]
    for prompt in ("hi", "<s>hi"):
        ids = [1, 3 + ord("h"), 3 + ord("i")]
        answer = runtime.answer(prompt, 5)
        for found in answer.token_ids:
            assert found == interpret(graph, np.array([ids]))[0, -1].argmax()
            ids.append(found)
        assert answer.stopped == (answer.token_ids[-1] == 2)
        assert len(answer.token_ids) == 5 or answer.stopped


def test_answer_ends_at_a_stop_token(tmp_path: Path) -> None:
    graph = random_graph(BASE, seed=3)
    first = int(interpret(graph, np.array([[1, 3 + ord("h")]]))[0, -1].argmax())
    model = model_of(graph)
    stopping = replace(model, tokenizer=replace(model.tokenizer, eos_ids=(first,)))
    artifact = write_artifact(stopping, tmp_path)
    answer = LlamaCpp(artifact / FILE).answer("h", 5)
    assert answer.token_ids == (first,) and answer.stopped and answer.text == ""


def test_a_damaged_file_is_reported_in_llama_cpps_words(tmp_path: Path) -> None:
    artifact = write_artifact(model_of(random_graph(BASE)), tmp_path)
    data = (artifact / FILE).read_bytes()
    (artifact / FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(GateError, match=r"cannot load the artifact.*model\.gguf.*corrupted or incomplete"):
        LlamaCpp(artifact / FILE)


def test_same_input_same_bytes(tmp_path: Path) -> None:
    graph = assign_schemes(random_graph(CONFIGS["llama_gqa_llama3_tied"]), scheme_named("int4_g32"), {})
    first = write_artifact(model_of(graph), tmp_path / "a")
    second = write_artifact(model_of(graph), tmp_path / "b")
    assert (first / FILE).read_bytes() == (second / FILE).read_bytes()
