"""What mlx-lm is told, and what it is not asked to do."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from converters.config import Rope, RopeKind, read_config
from converters.errors import UsageError
from converters.role import Role
from exporters.base import Activations, Model
from exporters.mlx.exporter import EXPORTER, split_shards
from exporters.mlx.modules import StoredTensor, find_modules, stored_tensors
from exporters.options import MlxOptions
from tests.exporters.tiny_checkpoints import make_model

PHI35 = Path(__file__).parents[2] / "data" / "configs" / "phi-3.5-mini-instruct"


def config_of(model: Model, options: MlxOptions | None = None) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(EXPORTER.layout(model, options or MlxOptions()).small["config.json"])
    return config


def with_config(model: Model, **changes: Any) -> Model:
    return replace(model, graph=replace(model.graph, config=replace(model.graph.config, **changes)))


@pytest.mark.parametrize(("context", "words"), [(32, "short factors apply"), (128, "long factors apply")])
def test_the_context_decides_longropes_factors(context: int, words: str, tmp_path: Path) -> None:
    model = make_model("phi4_mini", tmp_path, context=context)
    config, rope = config_of(model), model.graph.config.rope
    chosen = list(rope.short_factors if context == 32 else rope.long_factors)
    assert config["rope_scaling"] == {"type": "longrope", "short_factor": chosen, "long_factor": chosen}
    # From these two mlx-lm derives the attention factor.
    assert (config["max_position_embeddings"], config["original_max_position_embeddings"]) == (128, 32)
    assert config["partial_rotary_factor"] == 0.75
    semantics = EXPORTER.semantics(model, MlxOptions())
    assert (words in semantics.sentence, semantics.exact_to) == (True, context)


def test_an_attention_factor_of_its_own_reaches_mlx(tmp_path: Path) -> None:
    model = make_model("phi3_mini_128k", tmp_path)
    rope = replace(model.graph.config.rope, original_context=4096, attention_factor=1.25)
    config = config_of(with_config(model, rope=rope))
    longest = config["max_position_embeddings"]
    assert isinstance(longest, int)
    assert math.sqrt(1 + math.log(longest / 4096) / math.log(4096)) == pytest.approx(1.25, rel=1e-6)
    for factor in (0.9, 20.0):
        with pytest.raises(UsageError, match="attention factor"):
            EXPORTER.check(with_config(model, rope=replace(rope, attention_factor=factor)), MlxOptions())


def test_phi35_as_published(tmp_path: Path) -> None:
    model = make_model("phi3_mini_128k", tmp_path, "int4_g32")
    config = config_of(replace(with_config(model, rope=read_config(PHI35).rope), context_length=4096))
    assert (config["max_position_embeddings"], config["original_max_position_embeddings"]) == (131072, 4096)


def test_several_stop_tokens(tmp_path: Path) -> None:
    model = with_config(make_model("llama2", tmp_path), eos_token_ids=(2, 7, 9))
    small = EXPORTER.layout(model, MlxOptions()).small
    assert json.loads(small["config.json"])["eos_token_id"] == [2, 7, 9]
    assert json.loads(small["generation_config.json"])["eos_token_id"] == [2, 7, 9]
    assert json.loads(small["generation_config.json"])["temperature"] == 0.5


def test_quantization_names_the_modules_that_differ(tmp_path: Path) -> None:
    model = make_model("phi3_medium_gqa", tmp_path, "int4_g64", {Role.LM_HEAD: "int8_g32", Role.EMBEDDING: "fp16"})
    config = config_of(model)
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"] == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        # A row of 96 has groups of 32: the scheme's own rule.
        **{f"model.layers.{layer}.mlp.down_proj": {"group_size": 32, "bits": 4} for layer in range(2)},
        "lm_head": {"group_size": 32, "bits": 8},
    }
    assert config["torch_dtype"] == "float16"


def test_no_quantization_in_floats(tmp_path: Path) -> None:
    config = config_of(make_model("llama3", tmp_path, "bf16"))
    assert "quantization" not in config
    assert config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("scheme", "overrides", "activations", "expected"),
    [
        ("int4_g32", {Role.ATTN_V: "int8_g32"}, None, "attn_v: int8_g32"),
        ("int4_g32", {Role.MLP_UP: "fp16"}, None, "mlp.gate_up_proj"),
        ("int4_g32", {}, Activations.BF16, "fp16 or fp32"),
        ("int4_g32", {Role.EMBEDDING: "bf16"}, None, "role embedding"),
        ("fp32", {}, Activations.FP16, "scheme fp16 for activations fp16"),
    ],
)
def test_refused_schemes(
    scheme: str, overrides: dict[Role, str], activations: Activations | None, expected: str, tmp_path: Path
) -> None:
    model = make_model("phi3_mini_4k", tmp_path, scheme, overrides, context=60)
    with pytest.raises(UsageError, match=expected):
        EXPORTER.check(model, MlxOptions(activations=activations))


def test_fused_weights_share_the_smallest_group(tmp_path: Path) -> None:
    model = make_model("phi3_mini_4k", tmp_path, "int4_g64", {Role.ATTN_V: "int4_asym_g32"}, context=60)
    EXPORTER.check(model, MlxOptions())
    (module,) = (each for each in find_modules(model.graph) if each.path == "model.layers.1.self_attn.qkv_proj")
    assert module.quantization == {"group_size": 32, "bits": 4}


def test_refused_models(tmp_path: Path) -> None:
    window = make_model("phi3_window", tmp_path)
    with pytest.raises(UsageError, match="context to 7 or less"):
        EXPORTER.check(window, MlxOptions())
    EXPORTER.check(replace(window, context_length=7), MlxOptions())
    rope = window.graph.config.rope
    plain = with_config(window, sliding_window=None)
    for changes, expected in (
        ({"rope": replace(rope, kind=RopeKind.LLAMA3)}, "RoPE"),
        ({"head_dim": 24}, "head size"),
        ({"family": "llama", "rope": Rope(RopeKind.DEFAULT, 1e4, 8)}, "partial rotary"),
        ({"family": "gemma"}, "family"),
    ):
        with pytest.raises(UsageError, match=expected):
            EXPORTER.check(with_config(plain, **changes), MlxOptions())


def test_shards_are_those_of_mlx_lm(tmp_path: Path) -> None:
    model = make_model("llama2", tmp_path)
    tensors = [each for module in find_modules(model.graph) for each in stored_tensors(module, Activations.FP32)]
    limit = max(each.nbytes for each in tensors)
    shards = split_shards(tensors, limit)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert list(shards) == names and len(names) > 2
    assert all(sum(each.nbytes for each in shard) <= limit for shard in shards.values())
    joined: list[StoredTensor] = [each for shard in shards.values() for each in shard]
    assert joined == tensors
