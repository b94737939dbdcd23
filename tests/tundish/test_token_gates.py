"""No text of any kind differs between a container's tokenizer and transformers but as the container declares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")
transformers = pytest.importorskip("transformers")

from converters.source import Source  # noqa: E402
from converters.tokenizer import Tokenizer, read_tokenizer  # noqa: E402
from exporters.base import Difference  # noqa: E402
from exporters.gguf.differences import tokenizer_differences  # noqa: E402
from tests.exporters.gguf.llama_vocab import open_vocab  # noqa: E402
from tests.tundish.token_kinds import KINDS  # noqa: E402
from tundish.results import Gate  # noqa: E402
from tundish.token_corpus import generated_texts, probes  # noqa: E402
from tundish.token_gates import TokenReference, token_gates, token_reference  # noqa: E402

# What each kind has no key for in a GGUF file; the others are equal throughout.
OF_GGUF = {
    "llama2 of transformers 5": {"space before a space"},
    "mistral v0.3": {"first space", "first space, printed"},
    "phi3": {"other white space after a token"},
    "phi3 with two more": {"other white space after a token", "white space lost"},
    "gpt-2": {"spaces cleaned"},
    "llama3": {"spaces cleaned"},
    "tekken": {"words cut differently"},
    "o200k": {"words cut differently"},
}
FLAGS = {"white space after a token", "white space before a token", "token within a word"}
OF_GGUF |= {
    "llama2 with flags": FLAGS | {"normalized token", "normalized token, printed"},
    "llama2 of transformers 5 with flags": FLAGS | {"normalized token", "space before a space"},
    "qwen2 with flags": FLAGS,
}


def reference_of(folder: Path, texts: tuple[str, ...]) -> TokenReference:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tuple(each) for each in tokenizer(list(texts))["input_ids"]]
    return TokenReference(tuple(ids), tuple(tokenizer.decode(each, skip_special_tokens=True) for each in ids))


def gguf_gates(folder: Path, scratch: Path, tokenizer: Tokenizer, texts: tuple[str, ...]) -> list[Gate]:
    reference = reference_of(folder, texts)
    llama = open_vocab(scratch, tokenizer, "Phi-3.5-mini")
    try:
        ids = [llama.encode(text) for text in texts]
        decoded = [llama.decode(each) for each in reference.ids]
    finally:
        llama.close()
    return token_gates(texts, reference, ids, decoded, tokenizer_differences(tokenizer), 0.0)


def cases(quick: set[str]) -> list[object]:
    """Every tenth text of the quick kinds; every text of all kinds where time is no matter."""
    slow = [pytest.param(kind, 1, marks=pytest.mark.slow, id=f"{kind}, every text") for kind in KINDS]
    return [*(pytest.param(kind, 10, id=kind) for kind in KINDS if kind in quick), *slow]


@pytest.mark.parametrize(
    ("kind", "step"), cases({"phi3 with two more", "mistral v0.3", "llama3", "qwen2 with flags", "tekken", "smollm"})
)
def test_gguf_differs_as_declared_alone(kind: str, step: int, tmp_path: Path) -> None:
    model = KINDS[kind](tmp_path / "model")
    tokenizer = read_tokenizer(tmp_path / "model", model)
    texts = generated_texts(tokenizer)[::step]
    gates = gguf_gates(tmp_path / "model", tmp_path, tokenizer, texts)
    assert [gate.detail for gate in gates if not gate.passed] == []
    assert {each.name for each in tokenizer_differences(tokenizer)} == OF_GGUF.get(kind, set())
    if step == 1:  # each of them does occur
        assert {name for gate in gates for name in gate.declared} == OF_GGUF.get(kind, set())


@pytest.mark.parametrize(("kind", "step"), cases({"phi3", "qwen2 with flags"}))
def test_mlx_differs_nowhere(kind: str, step: int, tmp_path: Path) -> None:
    utils = pytest.importorskip("mlx_lm.tokenizer_utils")
    model = KINDS[kind](tmp_path / "model")
    texts = generated_texts(read_tokenizer(tmp_path / "model", model))[::step]
    reference, wrapper = reference_of(tmp_path / "model", texts), utils.load(tmp_path / "model")
    ids = [wrapper.encode(text) for text in texts]
    decoded = [wrapper.decode(list(each), skip_special_tokens=True) for each in reference.ids]
    assert [gate.detail for gate in token_gates(texts, reference, ids, decoded, (), 0.0) if not gate.passed] == []


def test_the_texts_are_many_and_the_same_each_time(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path / "m", KINDS["smollm"](tmp_path / "m"))
    texts = generated_texts(tokenizer)
    assert texts == generated_texts(tokenizer)
    assert len(set(texts)) == len(texts) >= 2000
    assert {ord(letter) >> 16 for text in texts for letter in text} >= {0, 1, 2, 3, 14, 15, 16}
    for part in ("\0", ".\r\n\r\n", "south,\r\nthe", "\u0085", "\u180e", "\u2028", "\u2003", "\u00a0", "\u3000", "\r"):
        assert any(part in text for text in texts), part


def test_every_added_token_is_probed(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path / "m", KINDS["smollm"](tmp_path / "m"))
    last = tokenizer.tokens[tokenizer.eos_ids[0]]
    many = [replace(last, text=f"<|extra{index}|>") for index in range(100)]
    texts = set(generated_texts(replace(tokenizer, tokens=(*tokenizer.tokens, *many))))
    assert all(set(probes(token.text)) <= texts for token in many)


def test_the_reference_is_made_by_transformers_in_a_child(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    KINDS["llama2"](folder)
    texts = ("Hello there.\r\n", "\0 a", "<s>a</s>")
    assert token_reference(Source(str(folder), folder, None, None), texts, tmp_path, 1) == reference_of(folder, texts)


TEXTS = ("a", "b c", "d")
REFERENCE = TokenReference(((1,), (2, 3), (4,)), ("a", "b c", "d"))
SPACED = Difference("spaced", "Spaces differ.", "encoding", lambda text: " " in text)


def test_a_text_that_no_declaration_explains_fails() -> None:
    tokens, decoding = token_gates(TEXTS, REFERENCE, [[1], [2, 9], [4]], ["a", "b c", "x"], (), 0.0)
    assert tokens.passed is False
    assert tokens.figure == pytest.approx(1 / 3)
    assert "2 texts equal, 1 differ; the first is 'b c', from token 1 on: expected [3], found [9]" in tokens.detail
    assert decoding.passed is False
    assert "from character 0 on: expected 'd', found 'x'" in decoding.detail


def test_declared_texts_are_counted_apart() -> None:
    tokens, decoding = token_gates(TEXTS, REFERENCE, [[1], [2, 9], [4]], ["a", "b c", "d"], (SPACED,), 0.0)
    assert tokens.passed is True
    assert tokens.detail == "2 texts equal, 1 differ as declared (spaced: 1)"
    assert tokens.declared == {"spaced": 1}
    assert (decoding.passed, decoding.detail, decoding.declared) == (True, "3 texts equal", {})
    other, _ = token_gates(TEXTS, REFERENCE, [[7], [2, 9], [4]], list(TEXTS), (SPACED,), 0.0)
    assert other.passed is False
    assert other.figure == pytest.approx(1 / 3)


def test_a_declaration_of_encoding_says_nothing_of_decoding() -> None:
    _, decoding = token_gates(TEXTS, REFERENCE, [[1], [2, 3], [4]], ["a", "bc", "d"], (SPACED,), 0.0)
    assert decoding.passed is False


def test_without_transformers_nothing_is_judged() -> None:
    assert [gate.passed for gate in token_gates(TEXTS, None, [[1], [2], [3]], [], (), 0.0)] == [None, None]
