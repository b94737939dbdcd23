"""What strangers write is refused as a TundishError, in time and memory. The long runs are `make fuzz`."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import json_file
from converters.config import read_config
from converters.errors import ModelError, TundishError
from converters.json_file import parse_json
from converters.load import load_graph
from converters.quantize.imatrix import read_imatrix
from converters.source import source_digest
from converters.tokenizer import read_tokenizer
from tests.fuzz.mutate import mutate_json
from tests.fuzz.parsers import CONFIG, PARSERS, TEMPLATE, accepted, byte_level, pieces, write_checkpoint
from tests.fuzz.run import CORPUS
from tundish import chat_renderer
from tundish.inspection import inspect_path
from tundish.manifest_file import read_manifest
from tundish.recipe import load_recipe
from tundish.source_card import read_source_card
from tundish.text_files import read_texts

ROOT = Path(__file__).resolve().parents[2]
REFUSED_SEEDS = {("jsonl", "seed0"), ("json", "seed1"), ("parquet", "text")}
SLOW = {"chat_template": 3}  # each starts a process
NAMES = [name for name in PARSERS if name != "parquet" or importlib.util.find_spec("pyarrow")]


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_what_they_claim_to_be(name: str) -> None:
    """Or all that is made of them would be refused for the same reason."""
    for seed, data in PARSERS[name].seeds().items():
        assert accepted(PARSERS[name], data) == ((name, seed) not in REFUSED_SEEDS), seed


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", NAMES)
def test_what_was_found_once_stays_mended(name: str) -> None:
    for path in sorted((CORPUS / name).glob("*")):
        start = time.monotonic()
        accepted(PARSERS[name], path.read_bytes())
        assert time.monotonic() - start < 30, path.name  # not 5: a busy machine is no finding


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", NAMES)
def test_damage_is_refused_or_does_no_harm(name: str) -> None:
    parser = PARSERS[name]
    seeds = sorted(parser.seeds().items())

    @settings(max_examples=SLOW.get(name, 30), deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**32), st.integers(1, 3))
    def damaged(number: int, times: int) -> None:
        random = Random(number)
        data = random.choice(seeds)[1]
        for _ in range(times):
            data = parser.mutate(data, random)
        accepted(parser, data)

    damaged()


def test_mutations_are_many_and_come_again() -> None:
    data = json.dumps(CONFIG).encode()
    found = [mutate_json(data, Random(number)) for number in range(50)]
    assert found == [mutate_json(data, Random(number)) for number in range(50)] and len({*found}) > 40


# ---- what is no file ----


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listener(path: Path) -> None:
    short = Path(os.path.relpath(path))  # a socket's name is 108 bytes at most
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(min(short, path, key=lambda each: len(str(each)))))


def read_all(folder: Path) -> None:
    source_digest(folder)
    read_tokenizer(folder, load_graph(folder).config)
    read_source_card(folder)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "shard": ("model-1.safetensors", lambda path: read_all(path.parent)),
    "single": ("model.safetensors", lambda path: read_all(path.parent)),
    "index": ("model.safetensors.index.json", lambda path: read_all(path.parent)),
    "config": ("config.json", lambda path: read_all(path.parent)),
    "generation": ("generation_config.json", lambda path: read_all(path.parent)),
    "tokenizer": ("tokenizer.json", lambda path: read_all(path.parent)),
    "gguf": ("gguf/model.gguf", lambda path: inspect_path(path.parent)),
    "mlx": ("mlx/model.safetensors", lambda path: inspect_path(path.parent)),
    "imatrix": ("imatrix.gguf", read_imatrix),
    "recipe": ("recipe.yaml", load_recipe),
    "manifest": ("build/manifest.json", lambda path: read_manifest(path.parent)),
    "text": ("text.jsonl", lambda path: list(read_texts(path))),
}


@pytest.mark.timeout(30)
@pytest.mark.skipif(sys.platform == "win32", reason="has no pipes among its files")
@pytest.mark.parametrize("kind", [pipe, device, listener])
@pytest.mark.parametrize("name", READERS)
def test_pipes_devices_and_sockets_are_refused_at_once(name: str, kind: Callable[[Path], None], tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    file, read = READERS[name]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    kind(path)
    with pytest.raises(TundishError):
        read(path)


OUTSIDE = {
    "model-1.safetensors": b"", "config.json": json.dumps(CONFIG).encode(), "generation_config.json": b"{}",
    "tokenizer.json": json.dumps(byte_level()).encode(), "tokenizer.model": pieces(), "chat_template.jinja": b"secret",
    "tokenizer_config.json": b"{}", "README.md": b"---\nlicense: secret\n---\n",
    "model.safetensors.index.json": b"{}",
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_links_out_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    """What they lead to would be packed into artifacts, and published."""
    folder, other = tmp_path / "model", tmp_path / "other"
    folder.mkdir()
    write_checkpoint(folder)
    other.write_bytes(OUTSIDE[name] or (folder / name).read_bytes())
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(other)
    with pytest.raises(ModelError, match="lies outside of its folder"):
        read_all(folder)


def test_links_into_the_blobs_of_the_hubs_cache_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "main"
    folder.mkdir(parents=True)
    write_checkpoint(folder)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    read_all(folder)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "a/../../other.safetensors", "\0", "."])
def test_an_index_may_not_name_files_elsewhere(shard: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(folder)
    (folder / "model-1.safetensors").rename(tmp_path / "other.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-1.safetensors", shard.replace("\0", "\\u0000")))
    with pytest.raises(ModelError):
        load_graph(folder)


# ---- small files that claim to be large ----


def test_json_that_would_take_gigabytes_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    parse_json(b'{"a":[' + b"[]," * 1000 + b"0]}", "x")
    monkeypatch.setattr(json_file, "MAX_VALUES", 1000)
    monkeypatch.setattr(json, "loads", lambda *arguments, **names: pytest.fail("it is parsed"))
    with pytest.raises(ModelError, match="more than 1000 values"):
        parse_json(b'{"a":[' + b"[]," * 1000 + b"0]}", "x")


def test_sizes_that_only_a_configuration_states_are_not_allocated(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")
    for name in sizes:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {name: 2**31 - 1}))
        if name != "max_position_embeddings":
            with pytest.raises(ModelError):
                load_graph(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 2**31 - 1}))
    with pytest.raises(ModelError, match="vocab_size is too large"):
        read_tokenizer(tmp_path, read_config(tmp_path))


def test_a_token_as_long_as_a_book_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    decoder = {"261": {"content": "x" * 5000}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(ModelError, match="a token is too long"):
        read_tokenizer(tmp_path, read_config(tmp_path))


# ---- templates ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path)
    return tmp_path


def rendered(folder: Path, template: str) -> str:
    (folder / "chat_template.jinja").write_text(template)
    with chat_renderer.chat_renderer(read_tokenizer(folder, read_config(folder))) as render:
        return render([{"role": "user", "content": "Hello"}], True)


def test_a_template_is_rendered_elsewhere_to_the_same(folder: Path) -> None:
    assert rendered(folder, TEMPLATE) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_a_child_that_dies_at_its_start_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def start_dead(command: list[str], **rest: Any) -> subprocess.Popen[str]:
        process = start([sys.executable, "-c", ""], **rest)
        process.wait()
        return process

    monkeypatch.setattr(subprocess, "Popen", start_dead)
    with pytest.raises(ModelError, match="too long or too much memory"):
        rendered(folder, TEMPLATE)


@pytest.mark.timeout(60)
def test_templates_without_end_are_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_renderer, "SECONDS", 1)
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(ModelError, match="too long or too much memory"):
        rendered(folder, loop)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 99999999999 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ 1 / 0 }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10) | join('x' * 999999) }}",
    ],
)
def test_templates_that_reach_for_memory_or_python_are_refused(folder: Path, template: str) -> None:
    with pytest.raises(ModelError, match=r"cannot be rendered|too much (memory|of a conversation)"):
        rendered(folder, template)


# ---- the network ----


def test_a_local_conversion_asks_for_no_network_and_runs_nothing_of_the_checkpoints(tmp_path: Path) -> None:
    """Python reports every connection to the hook; and a checkpoint's own code stays where it is."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(folder)
    config = CONFIG | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\nexec\n(V1\ntR.")
    recipe = {
        "description": "x", "device": "any", "context": "full", "schemes": {"default": "fp16"}, "targets": {"mlx": {}},
        "model": {"source": str(folder)}, "verify": {"enabled": False},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code = """
import sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        print("NETWORK", event, arguments, file=sys.stderr, flush=True)
        raise OSError("no network")
sys.addaudithook(hook)
from tundish.cli import main
main()
"""
    run = subprocess.run(
        [sys.executable, "-c", code, "build", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "NETWORK" not in run.stderr and not (tmp_path / "ran").exists()
    assert run.returncode == 0, run.stderr
