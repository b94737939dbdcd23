"""What the exporter refuses, what it tells onnxruntime-genai, and what it claims."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("onnx")

from converters.errors import UsageError
from converters.quantize.scheme import SCHEMES
from exporters.base import Activations, Model, Semantics
from exporters.onnx.exporter import EXPORTER
from exporters.onnx.settings import resolve_settings
from exporters.options import ExecutionProvider, OnnxOptions
from tests.exporters.onnx.models import LONG, SMALL, graph_of, layout_of
from tests.exporters.tiny_graphs import model_of, random_graph

CPU, DML = OnnxOptions(), OnnxOptions(execution_provider=ExecutionProvider.DML)


def longrope(original: int, context: int) -> Model:
    rope = replace(LONG, original_context=original)
    return model_of(random_graph(replace(SMALL, rope=rope, context_length=context, num_layers=1)))


def config_of(model: Model, options: OnnxOptions = CPU) -> dict[str, dict[str, object]]:
    config: dict[str, dict[str, object]] = json.loads(layout_of(model, options).small["genai_config.json"])
    return config


@pytest.mark.parametrize(
    ("provider", "activations"),
    [("cpu", "bf16"), ("dml", "fp32"), ("dml", "bf16"), ("cuda", "fp32"), ("webgpu", "bf16")],
)
def test_activations_a_provider_lacks(provider: str, activations: str) -> None:
    options = OnnxOptions(execution_provider=ExecutionProvider(provider), activations=Activations(activations))
    with pytest.raises(UsageError, match=f"{provider} provider does not compute attention in {activations}"):
        EXPORTER.check(model_of(graph_of("plain")), options)


@pytest.mark.parametrize("provider", ["dml", "webgpu"])
def test_bf16_weights_a_provider_cannot_read(provider: str) -> None:
    options = OnnxOptions(execution_provider=ExecutionProvider(provider))
    with pytest.raises(UsageError, match=r"cannot read bf16 weights \(target onnx, weight embedding\)"):
        EXPORTER.check(model_of(graph_of("plain", "fp32", embedding="bf16")), options)


def test_bf16_scales_would_not_be_the_quantizers() -> None:
    options = OnnxOptions(execution_provider=ExecutionProvider.CUDA, activations=Activations.BF16)
    with pytest.raises(UsageError, match=r"bf16 would change the weights .*blocks.0.attn_q.*scheme int4_g32"):
        EXPORTER.check(model_of(graph_of("plain", "bf16", attn_q="int4_g32")), options)
    EXPORTER.check(model_of(graph_of("plain", "bf16")), options)


@pytest.mark.parametrize(
    ("original", "context", "longest"),
    [
        (None, 2**31 - 1, 2**23),
        (4096, 2**31 - 1, 2**23),
    ],
)
def test_rotary_tables_that_no_memory_holds(original: int | None, context: int, longest: int) -> None:
    """Heads of 16: eight numbers a position."""
    model = model_of(graph_of("plain")) if original is None else longrope(original, 2**31 - 1)
    with pytest.raises(UsageError, match=rf"at most {longest} tokens; found {context}\. Set context to {longest} or"):
        EXPORTER.check(replace(model, context_length=context), CPU)
    EXPORTER.check(replace(model, context_length=longest), CPU)


def test_a_window_that_directml_would_ignore() -> None:
    model = model_of(graph_of("window"))
    with pytest.raises(UsageError, match="no sliding window") as error:
        EXPORTER.check(model, DML)
    assert "context to 9" in (error.value.mend or "")
    EXPORTER.check(replace(model, context_length=9), DML)
    EXPORTER.check(model, CPU)


@pytest.mark.parametrize(
    ("scheme", "row", "provider", "expected"),
    [
        ("int4_g32", 576, "cpu", 32),
        ("int4_g128", 3072, "cpu", 128),
        ("int8_channel", 3072, "cpu", 128),
        ("int8_channel", 96, "cpu", 32),
        ("int8_channel", 1000, "cpu", 0),
        ("int4_g64", 576, "cpu", 64),  # nine groups
        ("int4_g64", 576, "dml", 32),
        ("int8_g32", 96, "dml", 32),
    ],
)
def test_block_sizes(scheme: str, row: int, provider: str, expected: int) -> None:
    options = OnnxOptions(execution_provider=ExecutionProvider(provider))
    assert resolve_settings(model_of(graph_of("plain")), options).block_size(SCHEMES[scheme], row) == expected


@pytest.mark.parametrize(("original", "context"), [(4096, 4096), (4096, 8192), (8192, 16384)])
def test_the_model_type_does_not_make_genai_prefill_anew(original: int, context: int) -> None:
    assert config_of(longrope(original, context))["model"]["type"] not in ("phi3", "phi3small")


def test_genai_config() -> None:
    model = model_of(graph_of("gqa"), sampling={"do_sample": True, "temperature": 0.7})
    model = replace(model, tokenizer=replace(model.tokenizer, eos_ids=(5, 2), pad_id=None, bos_id=None))
    config = config_of(model)
    assert config["model"]["eos_token_id"] == [5, 2]
    assert config["model"]["pad_token_id"] == 5
    assert "bos_token_id" not in config["model"]
    assert config["search"]["temperature"] == 0.7
    assert config["search"]["do_sample"] is True
    decoder = config["model"]["decoder"]
    assert isinstance(decoder, dict)
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (16, 1)
    assert "position_ids" not in decoder["inputs"]
    assert decoder["session_options"]["provider_options"] == []


def test_genai_config_of_directml() -> None:
    decoder = config_of(model_of(graph_of("gqa")), DML)["model"]["decoder"]
    assert isinstance(decoder, dict)
    assert decoder["inputs"]["position_ids"] == "position_ids"
    assert [list(each) for each in decoder["session_options"]["provider_options"]] == [["dml"]]


@pytest.mark.parametrize("options", [CPU, DML])
def test_semantics(options: OnnxOptions) -> None:
    plain = EXPORTER.semantics(model_of(graph_of("plain")), options)
    assert plain == Semantics("The context is 128 tokens.", 128)
    assert "long factors apply at every position" in EXPORTER.semantics(longrope(4096, 8192), options).sentence
    assert "short factors apply at every position" in EXPORTER.semantics(longrope(4096, 4096), options).sentence
