"""Tiny random models of every shape that llama.cpp treats differently, and their artifacts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from converters.config import ModelConfig, RopeKind
from exporters.base import Layout, Model, Target
from exporters.gguf.exporter import EXPORTER
from tests.exporters.tiny_graphs import BASE, LLAMA3, PLAIN, longrope
from tundish.pour import pour

ORIGINAL = 256  # the smallest context that llama.cpp allocates: of a shorter one it would only take the long factors
LLAMA = replace(BASE, family="llama", num_kv_heads=2)

CONFIGS: dict[str, ModelConfig] = {
    "phi3": BASE,
    "phi3_longrope": replace(BASE, rope=longrope(ORIGINAL, 12), context_length=ORIGINAL),
    "phi3_longrope_long": replace(BASE, rope=longrope(ORIGINAL, 12), context_length=4 * ORIGINAL),
    "phi3_gqa_tied": replace(BASE, rope=replace(PLAIN, dim=12), num_kv_heads=2, tie_embeddings=True),
    "phi3_linear": replace(BASE, rope=replace(PLAIN, kind=RopeKind.LINEAR, factor=4.0)),
    "llama": replace(LLAMA, num_kv_heads=4),
    "llama_gqa_llama3_tied": replace(LLAMA, rope=LLAMA3, tie_embeddings=True),
    "llama_linear": replace(LLAMA, rope=replace(PLAIN, kind=RopeKind.LINEAR, factor=4.0)),
    "mistral_wide_heads": replace(LLAMA, family="mistral", head_dim=32, rope=replace(PLAIN, dim=32)),
}

# Rows of 256 and more values, so that the types of 256 values a block are stored as what they are.
_WIDE = replace(BASE, hidden_size=256, intermediate_size=512, head_dim=64, rope=replace(PLAIN, dim=64))
WIDE_CONFIGS: dict[str, ModelConfig] = {
    "phi3_wide": _WIDE,
    "phi3_wide_tied": replace(_WIDE, tie_embeddings=True),
    "llama_wide_gqa": replace(_WIDE, family="llama", num_kv_heads=1),
}


def layout_of(model: Model) -> Layout:
    EXPORTER.check(model, EXPORTER.options())
    return EXPORTER.layout(model, EXPORTER.options())


def write_artifact(model: Model, folder: Path) -> Path:
    """The folder of the finished artifact."""
    pour(model.graph, {Target.GGUF: layout_of(model)}, folder)
    return folder / Target.GGUF
