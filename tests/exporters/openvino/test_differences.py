"""OpenVINO's token ids and texts differ from transformers' as declared alone, for every kind of tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

genai = pytest.importorskip("openvino_genai")
pytest.importorskip("openvino_tokenizers")
transformers = pytest.importorskip("transformers")

from converters.config import ModelConfig  # noqa: E402
from converters.tokenizer import Tokenizer, read_tokenizer  # noqa: E402
from exporters.openvino.config import config_json  # noqa: E402
from exporters.openvino.differences import tokenizer_differences  # noqa: E402
from exporters.openvino.tokenizer import convert_tokenizer  # noqa: E402
from exporters.transformers_files import tokenizer_files  # noqa: E402
from tests.exporters.tiny_checkpoints import make_model  # noqa: E402
from tests.tundish.token_kinds import KINDS  # noqa: E402
from tundish.results import Gate  # noqa: E402
from tundish.token_corpus import generated_texts  # noqa: E402
from tundish.token_gates import TokenReference, token_gates  # noqa: E402

# What each kind has no regex for; the others are equal throughout.
DECLARED = {
    "llama2 with flags": {"token within a word", "normalized token", "normalized token, printed"},
    "llama2 of transformers 5 with flags": {"token within a word"},
    "qwen2 with flags": {"token within a word"},
}
QUICK = {"phi3 with two more": 10, "mistral v0.3": 10, "llama2 with flags": 10, "smollm": 10}


def open_converted(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> Any:
    model = make_model("llama2", folder)
    model = replace(model, graph=replace(model.graph, config=config), tokenizer=tokenizer)
    files = tokenizer_files(model)
    (folder / "artifact").mkdir()
    for name, data in (files | convert_tokenizer(files, config_json(model))).items():
        (folder / "artifact" / name).write_bytes(data)
    return genai.Tokenizer(folder / "artifact")


def gates_of(kind: str, folder: Path, step: int) -> tuple[Tokenizer, list[Gate]]:
    config = KINDS[kind](folder / "source")
    tokenizer = read_tokenizer(folder / "source", config)
    texts = generated_texts(tokenizer)[::step]
    found, expected = (
        open_converted(folder, tokenizer, config),
        transformers.AutoTokenizer.from_pretrained(folder / "source"),
    )
    ids = [tuple(each) for each in expected(list(texts))["input_ids"]]
    reference = TokenReference(tuple(ids), tuple(expected.decode(each, skip_special_tokens=True) for each in ids))
    encoded = [found.encode(text).input_ids.data.reshape(-1).tolist() for text in texts]
    decoded = [found.decode(list(each)) for each in ids]
    return tokenizer, token_gates(texts, reference, encoded, decoded, tokenizer_differences(tokenizer), 0.0)


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        *(pytest.param(kind, step, id=kind) for kind, step in QUICK.items()),
        *(pytest.param(kind, 1, marks=pytest.mark.slow, id=f"{kind}, every text") for kind in KINDS),
    ],
)
def test_openvino_differs_as_declared_alone(kind: str, step: int, tmp_path: Path) -> None:
    tokenizer, gates = gates_of(kind, tmp_path, step)
    assert [gate.detail for gate in gates if not gate.passed] == []
    assert {each.name for each in tokenizer_differences(tokenizer)} == DECLARED.get(kind, set())
    if step == 1:  # each of them does occur
        assert {name for gate in gates for name in gate.declared} == DECLARED.get(kind, set())


@pytest.mark.parametrize(
    ("text", "applies"),
    [
        ("a sword", False),
        ("swords", True),
        ("sword.", False),
        ("éswords", True),
        ("\u0301sword", True),
        ("½sword", False),
    ],
)
def test_a_word_is_told_by_what_is_beside_it(text: str, applies: bool, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path / "m", KINDS["qwen2 with flags"](tmp_path / "m"))
    (word,) = tokenizer_differences(tokenizer)
    assert word.applies(text) is applies
