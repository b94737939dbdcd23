"""Frequencies of every kind against transformers' own functions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from converters.config import Rope, RopeKind, read_config
from converters.rope import apply_rope, cos_sin, inverse_frequencies, uses_long_factors

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def test_default_by_hand() -> None:
    assert np.allclose(inverse_frequencies(Rope(RopeKind.DEFAULT, 10000.0, 4)), [1, 0.01])
    assert np.allclose(inverse_frequencies(Rope(RopeKind.LINEAR, 10000.0, 4, factor=4.0)), [0.25, 0.0025])


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.iterdir()))
def test_published_models_against_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.AutoConfig.from_pretrained(CONFIGS / name)
    if getattr(config, "head_dim", 0) is None:
        del config.head_dim
    rope = read_config(CONFIGS / name).rope
    lengths = {False: 10, True: 5000} if rope.kind is RopeKind.LONGROPE else {False: 10}
    for long, length in lengths.items():
        expected, factor = ROPE_INIT_FUNCTIONS[rope.kind.value](config, torch.device("cpu"), seq_len=length)
        assert uses_long_factors(rope, length) == long
        assert np.allclose(inverse_frequencies(rope, long=long), expected.numpy(), rtol=1e-6)
        assert math.isclose(rope.attention_factor, factor)


def test_long_factors_start_after_the_original_context() -> None:
    rope = Rope(RopeKind.LONGROPE, 10000.0, 4, original_context=8, short_factors=(1, 1), long_factors=(2, 2))
    assert not uses_long_factors(rope, 8)
    assert uses_long_factors(rope, 9)
    assert not uses_long_factors(Rope(RopeKind.LLAMA3, 10000.0, 4, original_context=8), 9)
    assert np.array_equal(cos_sin(rope, 9)[0], cos_sin(rope, 9, long=True)[0])
    assert not np.array_equal(cos_sin(rope, 9)[0], cos_sin(rope, 9, long=False)[0])


def test_rotation_by_hand() -> None:
    """Partial rotary: pair (0, 1) of four features turns by position radians, the other two stay."""
    rope = Rope(RopeKind.DEFAULT, 10000.0, 2, attention_factor=1.5)
    cos, sin = cos_sin(rope, 3)
    x = np.broadcast_to(np.array([1, 0, 5, 6], np.float32), (3, 4))
    expected = [[1.5 * math.cos(t), 1.5 * math.sin(t), 5, 6] for t in range(3)]
    assert np.allclose(apply_rope(x, cos, sin), expected, atol=1e-6)
