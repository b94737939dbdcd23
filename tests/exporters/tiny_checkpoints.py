"""Tiny checkpoints as their publishers write them, loaded, with a real tokenizer beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from converters.load import load_graph
from converters.passes.assign import assign_schemes
from converters.passes.context import for_context
from converters.quantize.scheme import scheme_named
from converters.role import Role
from converters.tokenizer import read_tokenizer
from exporters.base import Model
from tests.converters.tiny_models import make_checkpoint
from tests.converters.tiny_tokenizers import write_byte_level


def make_model(
    name: str,
    folder: Path,
    scheme: str = "fp32",
    overrides: Mapping[Role, str] | None = None,
    context: int | None = None,
) -> Model:
    """The tiny model of that name with schemes assigned. Its tokenizer has another size: tests choose ids directly."""
    graph = load_graph(make_checkpoint(name, folder / "checkpoint"))
    by_role = {role: scheme_named(each) for role, each in (overrides or {}).items()}
    graph = assign_schemes(graph, scheme_named(scheme), by_role)
    context = context or graph.config.context_length
    tokenizer = read_tokenizer(folder / "tokenizer", write_byte_level(folder / "tokenizer", None))
    return Model(for_context(graph, context), tokenizer, context, name, None, {"temperature": 0.5})
