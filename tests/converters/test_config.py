"""config.json in both spellings, the published files of real models, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from converters.config import Rope, RopeKind, read_config
from converters.config_keys import FAMILIES, IGNORED, NEUTRAL, READ
from converters.errors import ModelError
from converters.generation import read_generation
from converters.load import ARCHITECTURES

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
Config = dict[str, object]

PHI3: Config = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 32,
    "eos_token_id": 2,
    "rope_theta": 10000.0,
}
LLAMA = PHI3 | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MISTRAL = PHI3 | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write(folder: Path, config: Config, generation: Config | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def refusal(folder: Path, config: Config) -> str:
    with pytest.raises(ModelError) as caught:
        read_config(write(folder, config))
    return str(caught.value)


def test_every_architecture_has_its_keys() -> None:
    assert set(ARCHITECTURES) == set(FAMILIES)


def test_phi35_as_published() -> None:
    config = read_config(CONFIGS / "phi-3.5-mini-instruct")
    assert (config.family, config.vocab_size, config.num_layers, config.head_dim) == ("phi3", 32064, 32, 96)
    assert (config.num_heads, config.num_kv_heads, config.tie_embeddings) == (32, 32, False)
    assert config.sliding_window is None, "262144 is longer than the context"
    assert config.eos_token_ids == (32007, 32001, 32000), "generation_config.json wins"
    assert (config.bos_token_id, config.pad_token_id, config.context_length) == (1, 32000, 131072)
    rope = config.rope
    assert (rope.kind, rope.dim, rope.original_context, rope.theta) == (RopeKind.LONGROPE, 96, 4096, 10000.0)
    assert math.isclose(rope.attention_factor, 1.1902380714238083)
    assert (len(rope.short_factors), rope.short_factors[-1]) == (48, 2.8399994373321533)
    assert (len(rope.long_factors), rope.long_factors[0]) == (48, 1.0800000429153442)


def test_phi4_mini_as_published() -> None:
    config = read_config(CONFIGS / "phi-4-mini-instruct")
    assert (config.head_dim, config.rope.dim, config.num_kv_heads) == (128, 96, 8)
    assert (config.tie_embeddings, config.eos_token_ids) == (True, (199999,))


def test_llama32_as_published() -> None:
    config = read_config(CONFIGS / "llama-3.2-1b-instruct")
    assert config.rope == Rope(RopeKind.LLAMA3, 500000.0, 64, 32.0, 1.0, 4.0, 8192)
    assert (config.tie_embeddings, config.rms_norm_eps, config.pad_token_id) == (True, 1e-5, None)


def test_mistral_as_published() -> None:
    config = read_config(CONFIGS / "mistral-7b-v0.1")
    assert (config.sliding_window, config.context_length, config.num_kv_heads) == (4096, 32768, 8)


def new_spelling(config: Config) -> Config:
    """The same configuration as transformers 5 writes it."""
    scaling = dict(config.get("rope_scaling") or {})  # type: ignore[call-overload]
    rope = {"rope_type": scaling.pop("type", None) or scaling.pop("rope_type", "default"), **scaling}
    rope["rope_theta"] = config["rope_theta"]
    if config["model_type"] == "phi3":
        rope["partial_rotary_factor"] = config.get("partial_rotary_factor", 1.0)
    if rope["rope_type"] != "default" and "original_max_position_embeddings" in config:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    moved = ("rope_scaling", "rope_theta", "partial_rotary_factor", "torch_dtype")
    kept = {key: value for key, value in config.items() if key not in moved}
    return kept | {"rope_parameters": rope, "dtype": "bfloat16"}


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.iterdir()))
def test_both_spellings_are_the_same(name: str, tmp_path: Path) -> None:
    old = json.loads((CONFIGS / name / "config.json").read_text())
    config = read_config(write(tmp_path, old))
    new = new_spelling(old)
    assert "rope_theta" not in new
    assert read_config(write(tmp_path, new)) == config


@pytest.mark.parametrize("scaling", [{"type": "su"}, {"type": "yarn"}, {"type": "longrope"}, {"rope_type": "longrope"}])
def test_names_of_longrope(tmp_path: Path, scaling: Config) -> None:
    config = read_config(write(tmp_path, PHI3 | {"rope_scaling": scaling | LONG}))
    factor = math.sqrt(1 + math.log(4) / math.log(32))
    assert config.rope.kind is RopeKind.LONGROPE
    assert math.isclose(config.rope.attention_factor, factor)


def test_longrope_attention_factor(tmp_path: Path) -> None:
    def attention_factor(**settings: object) -> float:
        rope = {"type": "longrope", **LONG, **settings}
        return read_config(write(tmp_path, PHI3 | {"rope_scaling": rope})).rope.attention_factor

    ratio = attention_factor()
    assert attention_factor(factor=4.0) == ratio == attention_factor(factor=4)
    assert attention_factor(attention_factor=1.25) == 1.25 == attention_factor(attention_factor=1.25, factor=77.0)
    short = PHI3 | {"rope_scaling": {"type": "longrope", **LONG}, "max_position_embeddings": 32}
    assert read_config(write(tmp_path, short)).rope.attention_factor == 1.0


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    llama = read_config(write(tmp_path, LLAMA))
    assert (llama.num_kv_heads, llama.rms_norm_eps, llama.tie_embeddings, llama.sliding_window) == (
        4,
        1e-6,
        False,
        None,
    )
    phi3 = read_config(write(tmp_path, PHI3))
    assert (phi3.rms_norm_eps, phi3.sliding_window) == (1e-5, None)
    mistral = MISTRAL | {"max_position_embeddings": 8192}
    assert read_config(write(tmp_path, mistral)).sliding_window == 4096
    assert read_config(write(tmp_path, mistral | {"sliding_window": None})).sliding_window is None


def test_eos_rule(tmp_path: Path) -> None:
    config = PHI3 | {"eos_token_id": [7, 8]}
    assert read_config(write(tmp_path, config)).eos_token_ids == (7, 8)
    assert read_config(write(tmp_path, config, {"eos_token_id": 9})).eos_token_ids == (9,)
    assert read_config(write(tmp_path, config, {"eos_token_id": [3, 9, 3]})).eos_token_ids == (3, 9)
    assert read_config(write(tmp_path, config, {"temperature": 0.5})).eos_token_ids == (7, 8)
    assert read_config(write(tmp_path, PHI3 | {"pad_token_id": -1}, {})).pad_token_id is None


def test_sampling_defaults(tmp_path: Path) -> None:
    stated: Config = {"do_sample": True, "temperature": 0.6, "top_k": 40, "top_p": 0.9, "max_length": 4096}
    generation = read_generation(write(tmp_path, PHI3, stated))
    assert generation.sampling == {"do_sample": True, "temperature": 0.6, "top_k": 40, "top_p": 0.9}
    with pytest.raises(ModelError, match="key top_k"):
        read_generation(write(tmp_path, PHI3, {"top_k": True}))


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", -1), ("temperature", 1e300), ("top_p", 17), ("top_p", -0.1), ("top_k", -5), ("top_k", 2**31)],
)
def test_sampling_defaults_without_sense(tmp_path: Path, key: str, value: float) -> None:
    with pytest.raises(ModelError, match=f"key {key}"):
        read_generation(write(tmp_path, PHI3, {key: value}))


def test_sliding_window(tmp_path: Path) -> None:
    def window(**settings: object) -> int | None:
        return read_config(write(tmp_path, PHI3 | settings)).sliding_window

    assert window(sliding_window=127) == 127
    assert window(sliding_window=128) is None
    assert window(sliding_window=16, layer_types=["sliding_attention"] * 2) == 16
    assert window(layer_types=["full_attention"] * 2) is None
    assert window(sliding_window=16, use_sliding_window=False) is None
    assert window(sliding_window=16, use_sliding_window=False, layer_types=["full_attention"] * 2) is None
    assert window(sliding_window=16, use_sliding_window=True) == 16


def test_a_window_that_is_switched_off_is_noted(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, PHI3 | {"sliding_window": 16, "use_sliding_window": False}))
    assert any("use_sliding_window is false" in note for note in config.notes)
    llama = LLAMA | {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 28}
    assert read_config(write(tmp_path, llama)).sliding_window is None


NOTES = {"my_note": "x", "_flash_attn_2_enabled": True, "model_max_length": 4096, "_unsloth": {"a": 1}, "layers": [3]}


@pytest.mark.parametrize("config", [PHI3, LLAMA, MISTRAL], ids=["phi3", "llama", "mistral"])
def test_keys_that_transformers_does_not_read_either(tmp_path: Path, config: Config) -> None:
    plain = read_config(write(tmp_path, config))
    assert plain.notes == ()
    noted = read_config(write(tmp_path, config | NOTES))
    assert noted == plain
    (note,) = noted.notes
    assert all(repr(key) in note for key in NOTES)


def test_all_that_is_refused_is_told_at_once(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0}
    message = refusal(tmp_path, LLAMA | NOTES | {"attention_bias": True, "mlp_bias": True, "rope_scaling": yarn})
    assert "3 settings" in message
    for words in ("key attention_bias: True (expected False)", "key mlp_bias: True", "key rope_type: 'yarn'"):
        assert words in message
    assert "my_note" not in message


def test_declared_and_unknown_keys_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = replace(FAMILIES["llama"], declared=FAMILIES["llama"].declared | {"new_gate", "new_norm"})
    monkeypatch.setitem(FAMILIES, "llama", family)
    message = refusal(tmp_path, LLAMA | {"new_gate": 3, "new_norm": "x", "my_note": 1})
    assert "key new_gate: 3" in message
    assert "key new_norm: 'x'" in message


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_declared_keys_are_those_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    cls = type(transformers.AutoConfig.for_model(family))
    fields = {each.name for each in dataclasses.fields(cls)}
    settable = {
        name
        for base in cls.__mro__
        for name, value in vars(base).items()
        if isinstance(value, property) and value.fset is not None
    }
    assert FAMILIES[family].declared == fields | settable
    assert not FAMILIES[family].declared - READ - IGNORED - set(NEUTRAL)


def test_original_context_inside_alone_is_not_read(tmp_path: Path) -> None:
    inside = {"type": "longrope", **LONG, "original_max_position_embeddings": 32}
    config = {key: value for key, value in PHI3.items() if key != "original_max_position_embeddings"}
    read = read_config(write(tmp_path, config | {"rope_scaling": inside}))
    assert read.rope.original_context == 4096
    assert "original_max_position_embeddings is 4096" in read.notes[0]
    same = read_config(write(tmp_path, config | {"rope_scaling": inside | {"original_max_position_embeddings": 4096}}))
    assert (same, same.notes) == (read, ())


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": 128}),
        ("quantization_config", {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "gemm"}),
        ("quantization", {"bits": 4, "group_size": 64}),
    ],
)
def test_quantized_checkpoint_of_any_family(tmp_path: Path, key: str, settings: Config) -> None:
    message = refusal(tmp_path, {"model_type": "qwen9", key: settings})
    assert "already quantized" in message
    assert re.search(r"4 bits, groups of (128|64)", message)


DISAGREE = "versions of transformers.*key rope_theta"
# (settings, words of the message): an arithmetic-changing or unknown setting is named, never ignored.
REFUSED: list[tuple[Config, str]] = [
    (PHI3 | {"model_type": "qwen2"}, "unsupported model family.*one of phi3, llama, mistral; found 'qwen2'"),
    (PHI3 | {"model_type": None}, "unsupported model family"),
    (PHI3 | {"architectures": ["Phi3ForSequenceClassification"]}, "language model head"),
    (PHI3 | {"hidden_act": "gelu"}, "key hidden_act.*'gelu'"),
    (LLAMA | {"attention_bias": True}, "key attention_bias"),
    (LLAMA | {"mlp_bias": True}, "key mlp_bias"),
    (LLAMA | {"sliding_window": 64}, "key sliding_window"),
    (LLAMA | {"partial_rotary_factor": 0.5}, "rotates whole heads"),
    (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "already quantized.*found GPTQ"),
    (LLAMA | {"is_causal": False}, "key is_causal"),
    (LLAMA | {"per_layer_config": {"0": {"head_dim": 8}}}, "key per_layer_config"),
    (LLAMA | {"transformers_weights": "other.safetensors"}, "key transformers_weights"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}, "rope_theta": None}, DISAGREE),
    (LLAMA | {"embedding_multiplier": 12.0}, "key embedding_multiplier"),
    (LLAMA | {"residual_multiplier": 0.22}, "key residual_multiplier"),
    (LLAMA | {"attention_multiplier": 0.015}, "key attention_multiplier"),
    (LLAMA | {"logits_scaling": 8.0}, "key logits_scaling"),
    (LLAMA | {"final_logit_softcapping": 30.0}, "key final_logit_softcapping"),
    (LLAMA | {"use_qk_norm": True}, "key use_qk_norm"),
    (LLAMA | {"num_local_experts": 8}, "key num_local_experts"),
    (LLAMA | {"vision_config": {}}, "text-only"),
    (LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "key rope_type.*'yarn'"),
    (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "key rope_type.*'dynamic'"),
    (LLAMA | {"rope_scaling": {"type": "longrope", **LONG}}, "key rope_type.*'longrope'"),
    (LLAMA | {"rope_scaling": {"type": "linear"}}, "key factor.*nothing"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}}, "key beta_fast"),
    (LLAMA | {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "key low_freq_factor"),
    (LLAMA | {"rope_scaling": "linear"}, "key rope_scaling.*an object"),
    (LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "key full_attention"),
    (LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "contradicts itself.*rope_theta"),
    (PHI3 | {"rope_scaling": {"type": "longrope", **LONG, "long_mscale": 1.2}}, "key long_mscale"),
    (PHI3 | {"rope_scaling": {"type": "longrope", **LONG, "short_factor": [1.0] * 7}}, "8 numbers.*found 7 values"),
    (PHI3 | {"rope_scaling": {"type": "longrope", **LONG, "long_factor": [0] * 8}}, "numbers above 0"),
    (PHI3 | {"rope_scaling": {"type": "llama3"}}, "one of default, longrope for phi3"),
    (PHI3 | {"sliding_window": 16, "use_sliding_window": "no"}, "key use_sliding_window.*true or false"),
    (PHI3 | {"rope_scaling": {"type": "longrope", **LONG, "factor": 77.0}}, "differently.*key factor.*found 77"),
    (PHI3 | {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}, "key layer_types"),
    (PHI3 | {"partial_rotary_factor": 0.2}, "key partial_rotary_factor"),
    (PHI3 | {"num_attention_heads": 5}, "key hidden_size.*multiple"),
    (PHI3 | {"num_key_value_heads": 3}, "key num_key_value_heads.*divisor"),
    (PHI3 | {"vocab_size": "100"}, "key vocab_size.*integer"),
    (PHI3 | {"vocab_size": True}, "key vocab_size.*integer"),
    (PHI3 | {"num_hidden_layers": 0}, "key num_hidden_layers"),
    (PHI3 | {"hidden_size": None}, "key hidden_size.*nothing"),
    (PHI3 | {"rms_norm_eps": -1e-5}, "key rms_norm_eps"),
    (PHI3 | {"rope_theta": 10**400}, "key rope_theta"),
    (PHI3 | {"tie_word_embeddings": "no"}, "key tie_word_embeddings"),
    (PHI3 | {"eos_token_id": 100}, "outside the vocabulary.*100"),
    (PHI3 | {"eos_token_id": "2"}, "impossible token id"),
    (PHI3 | {"bos_token_id": 1.5}, "impossible token id"),
    (PHI3 | {"max_position_embeddings": 2**31}, "key max_position_embeddings.*to 2147483647"),
    (PHI3 | {"rms_norm_eps": 1e-300}, "key rms_norm_eps.*float32"),
    (PHI3 | {"rms_norm_eps": 1e300}, "key rms_norm_eps.*float32"),
    (PHI3 | {"rope_theta": 1e300}, "key rope_theta.*float32"),
    (PHI3 | {"rope_scaling": {"type": "longrope", **LONG, "attention_factor": 1e300}}, "key attention_factor"),
    (PHI3 | {"rope_scaling": {"type": "longrope", **LONG, "long_factor": [1e-300] * 8}}, "key long_factor"),
    (PHI3 | {"rope_scaling": {"type": "longrope", **LONG, "long_factor": [True] * 8}}, "key long_factor"),
    (PHI3 | {"hidden_size": "x" * 10_000}, r"key hidden_size.{1,200}$"),
]


@pytest.mark.parametrize(("config", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refused(tmp_path: Path, config: Config, words: str) -> None:
    assert re.search(words, refusal(tmp_path, config))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no valid JSON"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe{}", "no valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"a": NaN}', "constant NaN"),
        (b'{"a\\ud800": 1}', "surrogates not allowed"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    ],
)
def test_broken_json(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ModelError, match=words):
        read_config(tmp_path)


def test_a_repeated_key_among_many_is_found_at_once(tmp_path: Path) -> None:
    names = [*range(200_000), 199_999]
    (tmp_path / "config.json").write_text("{" + ",".join(f'"{name}":1' for name in names) + "}")
    start = time.monotonic()
    with pytest.raises(ModelError, match="'199999' twice"):
        read_config(tmp_path)
    assert time.monotonic() - start < 20


def test_pipe_or_folder_instead_of_config(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"config\.json.*not a file"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json.*not a file"):
        read_config(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"file missing.*config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_everything_that_transformers_saves_is_known(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family)
    everything = config.to_dict() | {"dtype": "bfloat16", "architectures": [FAMILIES[family].causal_lm]}
    (tmp_path / "config.json").write_text(json.dumps(everything))
    complete = read_config(tmp_path)
    config.architectures = [FAMILIES[family].causal_lm]
    config.save_pretrained(tmp_path)
    assert read_config(tmp_path) == complete
    assert (complete.vocab_size, complete.hidden_size) == (config.vocab_size, config.hidden_size)
