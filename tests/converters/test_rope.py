"""Frequencies of every kind against transformers' own."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters.config import Rope, RopeKind, read_config
from converters.rope import apply_rope, cos_sin, inverse_frequencies

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def test_default_by_hand() -> None:
    assert np.allclose(inverse_frequencies(Rope(RopeKind.DEFAULT, 10000.0, 4)), [1, 0.01])
    assert np.allclose(inverse_frequencies(Rope(RopeKind.LINEAR, 10000.0, 4, factor=4.0)), [0.25, 0.0025])


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.iterdir()))
def test_published_models_against_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    config = transformers.AutoConfig.from_pretrained(CONFIGS / name)
    module = importlib.import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    embedding = getattr(module, type(config).__name__.removesuffix("Config") + "RotaryEmbedding")(config)
    rope = read_config(CONFIGS / name).rope
    for length in (10, 5000):
        embedding(torch.zeros(1), torch.arange(length)[None])
        chosen = rope.for_context(length)
        assert chosen.long == (rope.kind is RopeKind.LONGROPE and length == 5000)
        assert np.allclose(inverse_frequencies(chosen), embedding.inv_freq.numpy(), rtol=1e-6)
        assert math.isclose(rope.attention_factor, embedding.attention_scaling)


def test_the_context_decides_the_factors_at_every_position() -> None:
    rope = Rope(RopeKind.LONGROPE, 10000.0, 4, original_context=8, short_factors=(1, 1), long_factors=(2, 2))
    within, beyond = rope.for_context(8), rope.for_context(9)
    assert (within.factors, beyond.factors) == ((1, 1), (2, 2))
    assert beyond.for_context(8) == within
    assert not Rope(RopeKind.LLAMA3, 10000.0, 4, original_context=8).for_context(9).long
    for each in (within, beyond):
        assert np.array_equal(cos_sin(each, 9)[0][:5], cos_sin(each, 5)[0])
    assert np.array_equal(cos_sin(beyond, 9)[0], cos_sin(replace(rope, short_factors=(2, 2)), 9)[0])


def test_rotation_by_hand() -> None:
    """Partial rotary: pair (0, 1) of four features turns by position radians, the other two stay."""
    rope = Rope(RopeKind.DEFAULT, 10000.0, 2, attention_factor=1.5)
    cos, sin = cos_sin(rope, 3)
    x = np.broadcast_to(np.array([1, 0, 5, 6], np.float32), (3, 4))
    expected = [[1.5 * math.cos(t), 1.5 * math.sin(t), 5, 6] for t in range(3)]
    assert np.allclose(apply_rope(x, cos, sin), expected, atol=1e-6)
