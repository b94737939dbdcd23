"""Adapters and quantized checkpoints, refused by what they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.checkpoint import open_checkpoint
from converters.config import read_config
from converters.errors import ModelError
from converters.load import load_graph
from converters.other_formats import describe

COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "input_activations": {"num_bits": 8},
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
        }
    },
    "ignore": ["lm_head"],
}


@pytest.mark.parametrize(
    ("settings", "described"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, "GPTQ, 4 bits, groups of 128"),
        ({"quant_method": "gptq", "bits": 3, "group_size": -1}, "GPTQ, 3 bits, a scale a row"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, "AWQ, 4 bits, groups of 64"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes (nf4), 4 bits, groups of 64",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits, a scale a row"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8, 8 bits, blocks of 128×128"),
        (COMPRESSED, "compressed-tensors (pack-quantized), 4 bits, groups of 128"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"num_bits": 8, "strategy": "channel"}}},
            },
            "compressed-tensors, 8 bits, a scale a row",
        ),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["a"]}, "MXFP4, 4 bits, groups of 32"),
        ({"quant_method": "hqq", "quant_config": {"w": {"nbits": 4, "group_size": 64}}}, "HQQ, 4 bits, groups of 64"),
        ({"quant_method": "brand-new"}, "brand-new"),
        ({"bits": 4, "group_size": 64}, "quantized weights (no quant_method is stated), 4 bits, groups of 64"),
    ],
)
def test_a_format_by_its_config(tmp_path: Path, settings: dict[str, object], described: str) -> None:
    assert describe(settings) == described  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    save_file({"a": np.zeros((2, 2), np.uint8)}, tmp_path / "model.safetensors")
    for read in (open_checkpoint, read_config, load_graph):
        with pytest.raises(ModelError) as caught:
            read(tmp_path)
        assert f"found {described}." in str(caught.value)


def test_hostile_settings_stay_short() -> None:
    assert len(describe({"quant_method": "x" * 10_000, "bits": [1] * 10_000})) <= 120
    deep: dict[str, object] = {"bits": 4}
    for _ in range(900):
        deep = {"inner": deep}
    assert describe(deep | {"quant_method": "gptq"}) == "GPTQ"  # type: ignore[arg-type]


I32, U8, F16 = np.int32, np.uint8, np.float16


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"q.qweight": ((8, 6), I32), "q.scales": ((2, 6), F16), "q.g_idx": ((64,), I32)},
            "I32, as in GPTQ, 4 bits, groups of 32",
        ),
        ({"q.qweight": ((64, 4), I32), "q.scales": ((2, 32), F16)}, "I32, as in AWQ, 4 bits, groups of 32"),
        ({"q.weight_packed": ((4, 4), I32), "q.weight_scale": ((4, 1), F16)}, "as in compressed-tensors"),
        ({"q.weight": ((4, 1), U8), "q.weight.absmax": ((4,), np.float32)}, "as in bitsandbytes, 4 bits"),
        ({"q.SCB": ((4,), np.float32), "q.weight": ((4, 4), np.int8)}, "as in bitsandbytes, 8 bits"),
        ({"up_blocks": ((4, 16), U8), "up_scales": ((4, 1), U8)}, "as in MXFP4, 4 bits, groups of 32"),
        ({"q.weight": ((4, 8), np.uint32), "q.scales": ((4, 1), F16), "q.biases": ((4, 1), F16)}, "as in MLX"),
        ({"q.qweight": ((), I32), "q.scales": ((2, 6), F16), "q.g_idx": ((64,), I32)}, "not supported.*found I32"),
    ],
)
def test_a_format_by_its_tensors(tmp_path: Path, tensors: dict[str, tuple[tuple[int, ...], type]], words: str) -> None:
    save_file(
        {name: np.zeros(shape, dtype) for name, (shape, dtype) in tensors.items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ModelError, match=words):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("with_model", [False, True])
def test_an_adapter_is_named_with_its_base(tmp_path: Path, with_model: bool) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "acme/tiny", "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "adapter_model.safetensors")
    if with_model:
        save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    for read in (open_checkpoint, read_config, load_graph):
        with pytest.raises(ModelError, match=r"an adapter \(LORA\) of acme/tiny.*merge_and_unload"):
            read(tmp_path)
