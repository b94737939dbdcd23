"""Rotary position embeddings: the one place where frequencies are computed, for the interpreter and every exporter."""

from __future__ import annotations

import math

import numpy as np

from converters.config import Rope, RopeKind
from converters.quantize.tensor import F32


def inverse_frequencies(rope: Rope) -> F32:
    """f32[dim/2]: radians per position of each rotated pair, scaled by the rope's kind.

    default: theta^(-2i/dim)  (Su et al. 2021).  linear: divided by factor.  longrope: divided by the factors that apply
    (Ding et al. 2024).  llama3: wavelengths above original/low_freq_factor are divided by factor, those below
    original/high_freq_factor kept, in between interpolated (Llama 3.1 model code).
    """
    exponent = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    base: F32 = np.float32(1) / np.power(np.float32(rope.theta), exponent, dtype=np.float32)
    return base / frequency_divisors(rope)


def frequency_divisors(rope: Rope) -> F32:
    """f32[dim/2]: what each unscaled frequency is divided by. All ones for the default kind."""
    half = rope.dim // 2
    if rope.kind is RopeKind.DEFAULT:
        return np.ones(half, np.float32)
    if rope.kind is RopeKind.LINEAR:
        return np.full(half, rope.factor, np.float32)
    if rope.kind is RopeKind.LONGROPE:
        return np.array(rope.factors, np.float32)
    exponent = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    wavelength = 2 * math.pi * np.power(np.float32(rope.theta), exponent, dtype=np.float32)
    low, high = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
    span = rope.high_freq_factor - rope.low_freq_factor
    smooth = (rope.original_context / wavelength - rope.low_freq_factor) / span
    middle = 1 / ((1 - smooth) / rope.factor + smooth)
    divisors = np.where(wavelength > low, rope.factor, np.where(wavelength < high, 1.0, middle))
    return divisors.astype(np.float32)


def cos_sin(rope: Rope, length: int) -> tuple[F32, F32]:
    """cos and sin, f32[length, dim/2] each, attention factor included."""
    angle = np.outer(np.arange(length, dtype=np.float32), inverse_frequencies(rope)).astype(np.float32)
    factor = np.float32(rope.attention_factor)
    return (np.cos(angle) * factor).astype(np.float32), (np.sin(angle) * factor).astype(np.float32)


def apply_rope(x: F32, cos: F32, sin: F32) -> F32:
    """Rotate x f32[..., length, head_dim] in half-split pairs (i, i + dim/2); features past dim pass unchanged."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
