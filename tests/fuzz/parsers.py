"""Every parser of files that strangers write: valid inputs to begin with, how they are made worse, what reads them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from gguf import GGUFWriter
from safetensors.numpy import save_file

from converters.config import read_config
from converters.errors import TundishError
from converters.generation import read_generation
from converters.json_file import Json
from converters.load import load_graph
from converters.quantize.imatrix import read_imatrix, write_imatrix
from converters.source import Source
from converters.tokenizer import read_tokenizer
from converters.tokenizer_json import ensure_tokenizer_json, fast_tokenizer
from exporters.base import Model
from tests.fuzz.mutate import Mutate, mutate_bytes, mutate_json, mutate_safetensors, mutate_text
from tundish.cache import canonical, entries, read_index
from tundish.calibration_cache import may_be_kept
from tundish.chat_renderer import chat_renderer
from tundish.inspection import inspect_path
from tundish.integrity import require_intact
from tundish.manifest_file import FORMAT, PROVENANCE, read_manifest
from tundish.model import open_model
from tundish.provenance import statement_bytes
from tundish.recheck import recorded_recipe
from tundish.recipe import load_recipe, recipe_digest
from tundish.settle import with_recorded_schemes
from tundish.source_card import read_source_card
from tundish.text_files import read_texts

VOCAB, HIDDEN = 280, 8
CONFIG: dict[str, Json] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 32},
    "bos_token_id": 258, "eos_token_id": [259], "pad_token_id": None, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16", "sliding_window": None,
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Parser:
    """`seeds` by name; `read` is given an input and a folder of its own, and may raise nothing but TundishError."""

    seeds: Callable[[], Mapping[str, bytes]]
    mutate: Mutate
    read: Callable[[bytes, Path], object]


def accepted(parser: Parser, data: bytes) -> bool:
    """Whether the parser takes an input; False where it refuses it as it should. Anything else is raised."""
    folder = _folder(parser.read.__name__)
    try:
        parser.read(data, folder)
    except TundishError:
        return False
    return True


@cache
def _folder(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    write_checkpoint(folder)
    return folder


def write_checkpoint(folder: Path) -> None:
    """A checkpoint of two shards that every reader takes."""
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,),
        layer + "input_layernorm.weight": (HIDDEN,), layer + "post_attention_layernorm.weight": (HIDDEN,),
        layer + "self_attn.q_proj.weight": (8, HIDDEN), layer + "self_attn.k_proj.weight": (4, HIDDEN),
        layer + "self_attn.v_proj.weight": (4, HIDDEN), layer + "self_attn.o_proj.weight": (HIDDEN, 8),
        layer + "mlp.gate_proj.weight": (16, HIDDEN), layer + "mlp.up_proj.weight": (16, HIDDEN),
        layer + "mlp.down_proj.weight": (HIDDEN, 16),
    }  # fmt: skip
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    halves = {1: [*tensors][:3], 2: [*tensors][3:]}
    for number, names in halves.items():
        save_file({name: tensors[name] for name in names}, folder / f"model-{number}.safetensors")
    weight_map = {name: f"model-{number}.safetensors" for number, names in halves.items() for name in names}
    files: dict[str, object] = {
        "config.json": CONFIG,
        "model.safetensors.index.json": {"metadata": {"total_size": 1}, "weight_map": weight_map},
        "generation_config.json": {"eos_token_id": [259], "bos_token_id": 258, "temperature": 0.5, "do_sample": True},
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


# ---- tokenizers ----


def byte_level() -> dict[str, Json]:
    """A tokenizer.json of byte-level BPE: GPT-2's 256 characters for bytes, two merges, two added tokens."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, plain), *(chr(256 + n) for n in range(256 - len(plain)))]
    vocab: dict[str, Json] = {text: index for index, text in enumerate([*letters, "he", "hel"])}
    added: list[Json] = [
        {"id": 258 + n, "content": text, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
         "single_word": False}
        for n, text in enumerate(("<s>", "</s>"))
    ]  # fmt: skip
    single: list[Json] = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    split: dict[str, Json] = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\s+"}, "behavior": "Isolated"}
    steps: list[Json] = [
        split | {"invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": {
            "type": "TemplateProcessing", "single": single, "pair": single,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [258], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": vocab, "merges": [["h", "e"], ["he", "l"]],
        },
    }  # fmt: skip


def byte_fallback() -> dict[str, Json]:
    """A tokenizer.json that looks like SentencePiece."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
    root, model = byte_level(), byte_level()["model"]
    assert isinstance(model, dict)
    replace: dict[str, Json] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps: list[Json] = [{"type": "Prepend", "prepend": "\u2581"}, replace]
    vocab: dict[str, Json] = {text: index for index, text in enumerate(texts)}
    bpe: dict[str, Json] = {
        "unk_token": "<unk>", "byte_fallback": True, "ignore_merges": False, "vocab": vocab,
        "merges": ["a b", "\u2581 ab"],
    }  # fmt: skip
    changed: dict[str, Json] = {
        "added_tokens": [], "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "normalizer": {"type": "Sequence", "normalizers": steps}, "model": model | bpe,
    }  # fmt: skip
    return root | changed


def pieces() -> bytes:
    """A tokenizer.model: the same vocabulary as protobuf."""

    def message(field: int, data: bytes) -> bytes:
        assert len(data) < 128
        return bytes([field << 3 | 2, len(data)]) + data

    texts = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "\u2581", "a", "b", "ab"]
    kinds = [2, 3, 3, *[6] * 256, 1, 1, 1, 1]
    rows = (
        message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", -float(n)) + bytes([3 << 3, kind]))
        for n, (text, kind) in enumerate(zip(texts, kinds, strict=True))
    )
    trainer = bytes([3 << 3, 2]) + b"\x98\x02\x01"  # BPE; field 35, byte_fallback: true
    return b"".join(rows) + message(2, trainer) + message(3, bytes([3 << 3, 1]))


def _tokenizer(name: str, absent: tuple[str, ...] = ()) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        for other in absent:
            (folder / other).unlink(missing_ok=True)
        tokenizer = read_tokenizer(folder, read_config(folder))
        ensure_tokenizer_json(tokenizer)
        return fast_tokenizer(tokenizer).encode("hello ab <s>", add_special_tokens=False).ids

    read.__name__ = name.replace(".", "_")
    return read


def read_template(data: bytes, folder: Path) -> object:
    (folder / "chat_template.jinja").write_bytes(data)
    with chat_renderer(read_tokenizer(folder, read_config(folder))) as render:
        return render([{"role": "user", "content": "Hello"}], True)


# ---- checkpoints ----


def _checkpoint(name: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        graph = load_graph(folder)
        for weight in graph.weights.values():
            weight.source.read(0, min(2, weight.shape[0]))
        read_generation(folder)
        return inspect_path(folder)

    read.__name__ = name.replace(".", "_")
    return read


def read_card(data: bytes, folder: Path) -> object:
    (folder / "README.md").write_bytes(data)
    return read_source_card(folder)


@cache
def checkpoint_file(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        return (Path(folder) / name).read_bytes()


# ---- GGUF ----


def gguf_seeds() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_uint32("general.alignment", 32)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
        writer.add_array("tokenizer.ggml.scores", [0.5, 1.0])
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
        writer.add_tensor("output.weight", np.zeros((4, 32), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {"model": path.read_bytes()}


def read_gguf_folder(data: bytes, folder: Path) -> object:
    artifact = folder / "artifact"
    artifact.mkdir(exist_ok=True)
    (artifact / "model.gguf").write_bytes(data)
    return inspect_path(artifact)


def imatrix_seeds() -> dict[str, bytes]:
    means = {"blk.0.attn_q.weight": np.ones(8, np.float32), "output.weight": np.full(4, 2, np.float32)}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, legacy in (("gguf", False), ("dat", True)):
            path = Path(folder) / name
            write_imatrix(path, means, chunks=2, chunk_size=16, datasets=["text"], legacy=legacy)
            found[name] = path.read_bytes()
    return found


def read_matrix(data: bytes, folder: Path) -> object:
    (folder / "imatrix").write_bytes(data)
    return read_imatrix(folder / "imatrix")


def read_mlx(data: bytes, folder: Path) -> object:
    artifact = folder / "mlx"
    artifact.mkdir(exist_ok=True)
    (artifact / "model.safetensors").write_bytes(data)
    return inspect_path(artifact / "model.safetensors")


# ---- recipes, manifests, text, the cache ----

RECIPE = b"""description: a test
device: any
model: {source: sample}
context: 2048
schemes:
  default: int4_g32
  overrides: {embedding: int8_g32}
method: gptq
calibration: {source: text, sequences: 8, length: 128, seed: 1}
budget: {size: 1.9GB, schemes: [int4_g32, int8_g32]}
targets:
  gguf: {}
  onnx: {activations: fp16}
verify:
  gates: {kl: 0.5, top1: 0.9}
"""
YAML_WORDS = (
    "&a ", "*a", "<<: *a", "!!python/object/apply:os.system [id]", "!!int x", "!!binary eA==", "? ", "- ", ": ", "{",
    "}", "[", "]", "|", ">", "null", "~", "1e999", "-1", "0x", "1_0", "99999999999999999999999", "1.9TB", ".inf",
    "'",
    '"', "\\x", "extends: phi35-mobile-int4", "extends: ../../x", "extends: /dev/zero", "\t", "\0", "---", "...",
    "%YAML 9", ".nan",
    "2001-01-01", "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", "{a: " * 40, "targets: {mlx: {}}", "60:60:60",
)  # fmt: skip


def read_recipe(data: bytes, folder: Path) -> object:
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    return recipe_digest(load_recipe(path))


def manifest_seeds() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(RECIPE.replace(b"  onnx: {activations: fp16}\n", b""))
        recipe = load_recipe(path)
    files = {"model.gguf": {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}}
    weight = {"shape": [VOCAB, HIDDEN], "scheme": "int8_g32", "digest": "x"}
    manifest = {
        "format": FORMAT, "tundish": "0.1.0", "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "source": {"name": "sample", "repo_id": None, "revision": None, "licence": None, "licence_name": None,
                   "licence_link": None, "languages": [], "files": {"config.json": "x"}}, "libraries": {},
        "recipe_digest": recipe_digest(recipe), "weights": {"embedding": weight}, "computed_by": "numpy",
        "targets": {"gguf": {"bytes": 3, "semantics": {"sentence": "x"}, "files": files, "documents": {}}},
        "verification": None, "calibration": None, "context_length": 8, "budget": None, "documents": {},
    }  # fmt: skip
    return {"manifest": json.dumps(manifest).encode()}


def read_build(data: bytes, folder: Path) -> object:
    build = folder / "build"
    (build / "gguf").mkdir(parents=True, exist_ok=True)
    (build / "gguf" / "model.gguf").write_bytes(b"abc")
    (build / "manifest.json").write_bytes(data)
    manifest = read_manifest(build)
    recipe = recorded_recipe(manifest, build)
    (build / PROVENANCE).write_bytes(statement_bytes(manifest, hashlib.sha256(data).hexdigest()))
    require_intact(build, 1)
    return with_recorded_schemes(_model(), recipe, manifest)


@cache
def _model() -> Model:
    folder = _folder("manifest_model")
    (folder / "recipe.yaml").write_bytes(RECIPE)
    return open_model(Source("x", folder), load_recipe(folder / "recipe.yaml"))


def _text(suffix: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> object:
        path = folder / f"text{suffix}"
        path.write_bytes(data)
        return sum(len(str(text)) for text in read_texts(path))

    read.__name__ = f"text_{suffix.removeprefix('.')}"
    return read


def parquet_seeds() -> dict[str, bytes]:
    import pyarrow
    from pyarrow import parquet

    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]
    tables = {
        "text": pyarrow.table({"text": ["one", "two", None], "n": [1, 2, 3]}),
        "messages": pyarrow.table({"messages": [talk, talk[:1]]}),
    }
    found = {}
    for name, table in tables.items():
        sink = io.BytesIO()
        parquet.write_table(table, sink)
        found[name] = sink.getvalue()
    return found


def index_seeds() -> dict[str, bytes]:
    content = {
        "key": {"version": 1, "method": "gptq", "schemes": {"embedding": "int8_g32"}, "text": {"seed": 1}},
        "model": "sample", "text": "documentation", "token_ids_sha256": "x", "bits": {"embedding": 8},
        "files": {"importance.npz": {"bytes": 3, "sha256": "x"}},
    }  # fmt: skip
    return {"index": json.dumps({"sha256": canonical(content), "content": content}).encode()}


def mutate_index(data: bytes, random: Random) -> bytes:
    """Mostly with the digest that it should have: whoever writes there can compute it."""
    worse = mutate_json(data, random)
    try:
        index = json.loads(worse)
        if isinstance(index, dict) and isinstance(index.get("content"), dict) and random.random() < 0.9:
            index["sha256"] = canonical(index["content"])
            return json.dumps(index).encode()
    except (ValueError, RecursionError):
        pass
    return worse


def read_cache(data: bytes, folder: Path) -> object:
    entry = folder / "calibrations" / ("0" * 64)
    entry.mkdir(parents=True, exist_ok=True)
    (entry / "index.json").write_bytes(data)
    before = os.environ.get("TUNDISH_CACHE")
    os.environ["TUNDISH_CACHE"] = str(folder)
    try:
        graph, recipe = _model().graph, load_recipe(_folder("manifest_model") / "recipe.yaml")
        return read_index(entry), entries(), may_be_kept(graph, recipe)
    finally:
        if before is None:
            del os.environ["TUNDISH_CACHE"]
        else:
            os.environ["TUNDISH_CACHE"] = before


def _seed(name: str) -> Callable[[], Mapping[str, bytes]]:
    return lambda: {"tiny": checkpoint_file(name)}


def _dump(*documents: object) -> Callable[[], Mapping[str, bytes]]:
    return lambda: {f"seed{n}": json.dumps(document).encode() for n, document in enumerate(documents)}


JINJA_WORDS = (
    "{% for i in range(99999) %}", "{% for j in range(99999) %}", "{% endfor %}", "{% if ", "{% endif %}", "{{ ", " }}",
    "{% set x = 'a' * 9999999999 %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "{{ 10 ** 10 ** 8 }}", "{{ x | attr('__class__') }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ '%999999999d' % 1 }}", "{{ '{:>999999999}'.format(1) }}", "{{ range(10) | join('x' * 9999999) }}", "{% raw %}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "{{ lipsum(n=9999) }}", "{% generation %}", "| tojson",
    "{{ self.__dict__ }}", "{{ namespace.__init__ }}", "{{ messages | map(attribute='__class__') | list }}", "\0",
    "{{ " + "(" * 500, "{% if 1 %}" * 200, "{{ 'x' | indent(99999999) }}", "{{ 'x' | center(999999999) }}",
)  # fmt: skip

TOKENS: tuple[Json, ...] = (
    {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": {"content": "</s>"}},
    {"added_tokens_decoder": {"260": {"content": "<x>", "special": True}}, "chat_template": [
        {"name": "default", "template": "x"}], "eos_token": "</s>", "add_prefix_space": False},
)  # fmt: skip
TEXTS: tuple[Json, ...] = (
    [{"text": "one"}, {"messages": [{"role": "user", "content": "Hello"}]}],
    {"text": "one"},
)

PARSERS: dict[str, Parser] = {
    "safetensors": Parser(_seed("model-1.safetensors"), mutate_safetensors, _checkpoint("model-1.safetensors")),
    "index": Parser(_seed("model.safetensors.index.json"), mutate_json, _checkpoint("model.safetensors.index.json")),
    "config": Parser(_seed("config.json"), mutate_json, _checkpoint("config.json")),
    "generation_config": Parser(_seed("generation_config.json"), mutate_json, _checkpoint("generation_config.json")),
    "card": Parser(lambda: {"card": b"---\nlicense: mit\ntags: [a]\n---\n# T\n"}, mutate_text(YAML_WORDS), read_card),
    "tokenizer_json": Parser(_dump(byte_level(), byte_fallback()), mutate_json, _tokenizer("tokenizer.json")),
    "tokenizer_config": Parser(_dump(*TOKENS), mutate_json, _tokenizer("tokenizer_config.json")),
    "special_tokens_map": Parser(_dump(TOKENS[0]), mutate_json, _tokenizer("special_tokens_map.json")),
    "tokenizer_model": Parser(
        lambda: {"pieces": pieces()}, mutate_bytes, _tokenizer("tokenizer.model", ("tokenizer.json",))
    ),
    "chat_template": Parser(lambda: {"chatml": TEMPLATE.encode()}, mutate_text(JINJA_WORDS), read_template),
    "gguf": Parser(gguf_seeds, mutate_bytes, read_gguf_folder),
    "imatrix": Parser(imatrix_seeds, mutate_bytes, read_matrix),
    "mlx": Parser(_seed("model-2.safetensors"), mutate_safetensors, read_mlx),
    "recipe": Parser(lambda: {"all": RECIPE}, mutate_text(YAML_WORDS), read_recipe),
    "manifest": Parser(manifest_seeds, mutate_json, read_build),
    "jsonl": Parser(_dump(*TEXTS), mutate_json, _text(".jsonl")),
    "json": Parser(_dump(*TEXTS), mutate_json, _text(".json")),
    "text": Parser(lambda: {"words": "Prose, é \U0001f600\n".encode()}, mutate_bytes, _text(".txt")),
    "parquet": Parser(parquet_seeds, mutate_bytes, _text(".parquet")),
    "cache_index": Parser(index_seeds, mutate_index, read_cache),
}
