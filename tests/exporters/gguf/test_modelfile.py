"""Ollama's Modelfile, read by the rules of its parser."""

from __future__ import annotations

from dataclasses import replace

from exporters.base import Model
from exporters.gguf.exporter import FILE
from exporters.gguf.modelfile import MODELFILE, modelfile
from tests.exporters.gguf.models import CONFIGS, layout_of
from tests.exporters.tiny_graphs import model_of, random_graph


def commands(text: str) -> list[tuple[str, ...]]:
    """Each line's command; quotes around a value are not part of it."""
    parsed = []
    for line in text.splitlines():
        name, rest = line.split(" ", 1)
        parts = rest.split(" ", 1) if name == "PARAMETER" else [rest]
        if parts[-1].startswith('"'):
            assert parts[-1].endswith('"') and len(parts[-1]) > 1
            parts[-1] = parts[-1][1:-1]
        parsed.append((name, *parts))
    return parsed


def with_stops(*texts: str) -> Model:
    model = model_of(random_graph(CONFIGS["phi3"]))
    tokens = list(model.tokenizer.tokens)
    tokens[: len(texts)] = [replace(token, text=text) for token, text in zip(tokens, texts, strict=False)]
    ids = tuple(range(len(texts)))
    return replace(model, tokenizer=replace(model.tokenizer, tokens=tuple(tokens), eos_ids=(*ids, 0)))


def test_the_file_its_context_and_what_ends_an_answer() -> None:
    model = with_stops("<|end|>", "<｜end of turn｜>")
    assert commands(modelfile(model, FILE).decode()) == [
        ("FROM", "./model.gguf"),
        ("PARAMETER", "num_ctx", str(model.context_length)),
        ("PARAMETER", "stop", "<|end|>"),
        ("PARAMETER", "stop", "<｜end of turn｜>"),
    ]
    assert layout_of(model).small == {MODELFILE: modelfile(model, FILE)}


def test_what_its_grammar_cannot_spell_is_left_to_the_ids() -> None:
    """A quote would end the value, a line break the command; its parser drops what cannot be printed."""
    text = modelfile(with_stops('"', 'a"b', "\n", "a\nFROM ./x", " ", "\u0007", "</s>"), FILE).decode()
    assert commands(text)[2:] == [("PARAMETER", "stop", "</s>")]
