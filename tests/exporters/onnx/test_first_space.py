"""A tokenizer that wants a space at the start of the text only: chat prompts begin with a special token instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime_genai")
transformers = pytest.importorskip("transformers")
pytest.importorskip("mistral_common")

from converters.tokenizer import read_tokenizer  # noqa: E402
from converters.vocabulary import SpacePrefix  # noqa: E402
from exporters.base import Model  # noqa: E402
from exporters.onnx.exporter import EXPORTER  # noqa: E402
from exporters.options import OnnxOptions  # noqa: E402
from tests.converters.tiny_tokenizers import write_sentencepiece  # noqa: E402
from tests.exporters.onnx.models import SMALL, write_artifact  # noqa: E402
from tests.exporters.tiny_graphs import random_graph  # noqa: E402

CHATS = ("<s>[INST] What is it? [/INST]", "<s> [INST] a", "<s>Hello</s><s>\nHi </s>", "<s> one")


@pytest.mark.parametrize("json_file", [False, True])
def test_chat_prompts_get_no_space(json_file: bool, tmp_path: Path) -> None:
    """The same whether the checkpoint has tokenizer.model alone or a tokenizer.json with Metaspace."""
    source = tmp_path / "checkpoint"
    config = write_sentencepiece(source, legacy=False, add_bos_token=False)
    if json_file:
        transformers.LlamaTokenizerFast.from_pretrained(source, legacy=False).save_pretrained(source)
        assert '"prepend_scheme": "first"' in (source / "tokenizer.json").read_text()
    reference = transformers.LlamaTokenizerFast.from_pretrained(source, legacy=False)
    tokenizer = read_tokenizer(source, config)
    assert tokenizer.space_prefix is SpacePrefix.FIRST
    shape = replace(SMALL, vocab_size=config.vocab_size, hidden_size=64, num_layers=1)
    model = Model(random_graph(shape), tokenizer, shape.context_length, "Tiny")
    runtime = EXPORTER.open(write_artifact(model, tmp_path), OnnxOptions())
    for chat in CHATS:
        assert runtime.tokenize(chat) == reference(chat, add_special_tokens=False)["input_ids"], chat
