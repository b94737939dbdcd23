"""onnxruntime-genai opens the folder as it is: token ids are transformers', generation is greedy and stops."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
og = pytest.importorskip("onnxruntime_genai")
transformers = pytest.importorskip("transformers")
pytest.importorskip("mistral_common")

from converters.config import ModelConfig  # noqa: E402
from converters.tokenizer import read_tokenizer  # noqa: E402
from exporters.base import Model  # noqa: E402
from exporters.onnx.exporter import EXPORTER  # noqa: E402
from exporters.options import OnnxOptions  # noqa: E402
from tests.converters.tiny_tokenizers import (  # noqa: E402
    LLAMA3,
    O200K,
    TEKKEN,
    gate_texts,
    write_byte_level,
    write_json,
    write_sentencepiece,
)
from tests.exporters.onnx.models import LONG, ORIGINAL, SMALL, write_artifact  # noqa: E402
from tests.exporters.oracle import random_ids, reference_logits  # noqa: E402
from tests.exporters.tiny_graphs import random_graph  # noqa: E402


def sentencepiece_json(folder: Path, phi3: bool) -> ModelConfig:
    """tokenizer.json alone, as transformers saves it."""
    config = write_sentencepiece(folder / "source", phi3)
    transformers.AutoTokenizer.from_pretrained(folder / "source").save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    write_json(folder / "config.json", {"model_type": config.family})  # decides which class reads the file
    return config


# transformers 5 merges a tokenizer.model in the order of its ids, SentencePiece and we in that of its scores. In this
# model runs of spaces have early ids and the lowest scores.
MERGED_BY_ID = re.compile(r"[ \u2581]{2}|\A[ \u2581]")

TOKENIZERS: dict[str, Callable[[Path], ModelConfig]] = {
    "gpt2": lambda folder: write_byte_level(folder, None),
    "smollm": lambda folder: write_byte_level(folder, None, digits=True),
    "llama3": lambda folder: write_byte_level(folder, LLAMA3, ignore_merges=True),
    "phi4_mini": lambda folder: write_byte_level(folder, O200K),
    "tekken": lambda folder: write_byte_level(folder, TEKKEN),
    "llama2": write_sentencepiece,
    "phi3": lambda folder: write_sentencepiece(folder, phi3=True),
    "llama2_json": lambda folder: sentencepiece_json(folder, False),
    "phi3_json": lambda folder: sentencepiece_json(folder, True),
}


def model_with(folder: Path, config: ModelConfig, **changes: object) -> Model:
    """A tiny random model whose vocabulary is that of the tokenizer in `folder`."""
    shape = replace(SMALL, vocab_size=config.vocab_size, hidden_size=64, num_layers=1, **changes)  # type: ignore[arg-type]
    return Model(random_graph(shape), read_tokenizer(folder, config), shape.context_length, "Tiny")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_ids_equal_transformers(name: str, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    source.mkdir()
    model = model_with(source, TOKENIZERS[name](source))
    artifact = write_artifact(model, tmp_path)
    runtime = EXPORTER.open(artifact, OnnxOptions())
    reference = transformers.AutoTokenizer.from_pretrained(source)
    for path in source.glob("config.json"):  # without it transformers takes another class
        shutil.copy(path, artifact)
    again = transformers.AutoTokenizer.from_pretrained(artifact)
    declared = [kind for kind in EXPORTER.differences(model, OnnxOptions()) if kind.of == "encoding"]
    texts = [text for text in gate_texts(model.tokenizer) if not any(kind.applies(text) for kind in declared)]
    if "tokenizer.json" not in model.tokenizer.files:
        texts = [text for text in texts if not MERGED_BY_ID.search(text)]
    assert len(texts) > 10
    for text in texts:
        expected = reference(text)["input_ids"]
        assert runtime.tokenize(text) == expected, text
        assert again(text)["input_ids"] == expected, f"transformers reads the artifact differently: {text}"


def likeliest(model: Model, prompt: list[int], answer: list[int]) -> bool:
    """Whether each token of the answer is the interpreter's choice after those before it."""
    logits = reference_logits(model.graph, [*prompt, *answer])
    return bool((logits[len(prompt) - 1 : -1].argmax(axis=-1) == answer).all())


def next_tokens(generator: Any, count: int) -> np.ndarray:
    """i32[count, batch]"""
    said = []
    for _ in range(count):
        generator.generate_next_token()
        said.append(generator.get_next_tokens())
    return np.array(said)


def test_answers_and_turns_cross_longropes_original_context(tmp_path: Path) -> None:
    model = model_with(tmp_path / "checkpoint", write_byte_level(tmp_path / "checkpoint", LLAMA3), rope=LONG)
    runtime = EXPORTER.open(write_artifact(model, tmp_path), OnnxOptions())
    turns = [random_ids(model.graph, length) for length in (ORIGINAL - 3, 20, 9)]
    said: list[int] = []
    for turn, answer in zip(turns, runtime.converse(turns, 6), strict=True):
        assert len(answer) == 6 and likeliest(model, [*said, *turn], answer)
        said += [*turn, *answer]


def test_a_batch_crosses_longropes_original_context(tmp_path: Path) -> None:
    model = model_with(tmp_path / "checkpoint", write_byte_level(tmp_path / "checkpoint", LLAMA3), rope=LONG)
    opened = og.Model(str(write_artifact(model, tmp_path)))
    params = og.GeneratorParams(opened)
    params.set_search_options(do_sample=False, max_length=model.context_length, batch_size=2)
    prompts = [random_ids(model.graph, ORIGINAL - 3), random_ids(model.graph, ORIGINAL - 2)[1:]]
    generator = og.Generator(opened, params)
    generator.append_tokens(np.array(prompts, np.int32))
    answers = next_tokens(generator, 9)
    for row, prompt in enumerate(prompts):
        assert likeliest(model, prompt, answers[:, row].tolist())


def test_the_card_shows_how_to_ask(tmp_path: Path) -> None:
    """Its lines run where the artifact is, and print the answer alone."""
    source = tmp_path / "checkpoint"
    model = model_with(source, write_byte_level(source, LLAMA3))
    template = "{% for m in messages %}User: {{ m.content }}\nBot:{% endfor %}"
    model = replace(model, tokenizer=replace(model.tokenizer, chat_template=template))
    artifact = write_artifact(model, tmp_path)
    code = EXPORTER.card.usage.removeprefix("```python\n").removesuffix("```")
    said = subprocess.run([sys.executable, "-c", code], cwd=artifact, capture_output=True, text=True, check=True).stdout
    answer = EXPORTER.open(artifact, OnnxOptions()).answer("User: What is the capital of France?\nBot:", 100)
    assert said.removesuffix("\n") == answer.text != ""


@pytest.mark.parametrize("which", [0, 1])
def test_every_stop_id_stops(which: int, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    config = write_byte_level(source, LLAMA3)
    model = model_with(source, config)
    prompt = "Hello there"
    ids = transformers.AutoTokenizer.from_pretrained(source)(prompt, add_special_tokens=False)["input_ids"]
    first = int(np.argmax(reference_logits(model.graph, ids)[-1]))
    stops = (first, 7) if which == 0 else (7, first)
    model = replace(model, tokenizer=replace(model.tokenizer, eos_ids=stops))
    answer = EXPORTER.open(write_artifact(model, tmp_path), OnnxOptions()).answer(prompt, 20)
    assert answer.token_ids == (first,)
    assert answer.stopped
