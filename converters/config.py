"""What a model is, apart from its weights: sizes, rotary embedding, special ids. Parsed from config.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TypeGuard

import numpy as np

from converters import config_keys
from converters.errors import ModelError
from converters.generation import Generation, read_generation, token_id, token_ids
from converters.json_file import Json, inside, read_json
from converters.other_formats import refuse_other_formats

FILE = "config.json"
MAX_INTEGER = 2**31 - 1  # containers and runtimes have 32 bits for sizes, contexts and ids


class RopeKind(Enum):
    """How rotary frequencies are scaled. The value is the key that config.json uses."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    LONGROPE = "longrope"


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding, in the half-split ("neox") arrangement that Hugging Face uses.

    `dim` is the number of rotated dimensions of a head (all of them, or the first part: partial rotary).
    `attention_factor` multiplies cos and sin. LongRoPE alone uses the factor lists, each of length dim/2. `long` says
    which of them rotates, at every position: as read, the short ones; see `for_context`.
    """

    kind: RopeKind
    theta: float
    dim: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    long: bool = False

    @property
    def factors(self) -> tuple[float, ...]:
        """LongRoPE's factors that apply."""
        return self.long_factors if self.long else self.short_factors

    def for_context(self, context: int) -> Rope:
        """The embedding of a model that is to read up to `context` tokens: beyond LongRoPE's original context the long
        factors apply, else the short ones.

        transformers goes by the length so far instead, which no cache of rotated keys survives.
        """
        return replace(self, long=self.kind is RopeKind.LONGROPE and context > self.original_context)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The normalized configuration of a decoder-only model: both spellings of config.json end here.

    `notes` are sentences on what was read otherwise than the files say, for people.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    context_length: int
    sliding_window: int | None
    tie_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one JSON object, read with the family's defaults. `where` leads to them in messages.

    A key that says null is not absent: Mistral's `sliding_window: null` means none, no key means 4096.
    """

    raw: Mapping[str, Json]
    defaults: Mapping[str, Json]
    where: str
    notes: tuple[str, ...] = ()

    def get(self, key: str) -> Json:
        return self.raw[key] if key in self.raw else self.defaults.get(key)

    def fail(self, key: str, expected: str) -> ModelError:
        value = self.get(key)
        found = (
            "nothing"
            if value is None
            else f"{len(value)} values"
            if isinstance(value, list)
            else config_keys.shown(value)
        )
        where = f"{self.where}, key {key}"
        return ModelError("value missing or impossible", where=where, expected=expected, found=found)

    def integer(self, key: str, at_least: int = 1) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value <= MAX_INTEGER:
            raise self.fail(key, f"an integer, {at_least} to {MAX_INTEGER}")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.get(key) is None else self.integer(key)

    def number(self, key: str) -> float:
        value = self.get(key)
        if not _is_positive(value):
            raise self.fail(key, "a number above 0, in the range of float32")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self.get(key)
        values = value if isinstance(value, list) else []
        result = tuple(float(each) for each in values if _is_positive(each))
        if len(result) != count or len(values) != count:
            raise self.fail(key, f"a list of {count} numbers above 0, in the range of float32")
        return result


def _is_positive(value: Json) -> TypeGuard[int | float]:
    """Whether float32, which models compute in, holds the value as a positive and finite number."""
    least, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= largest


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a checkpoint folder, from config.json and generation_config.json.

    A key that is absent has the value that the family's class in transformers gives it. A key that this class declares
    and tundish does not know is an error: it may change what the model computes. Special ids: generation_config.json
    wins over config.json, since transformers' generate() uses it alone.
    """
    refuse_other_formats(folder)
    raw = read_json(inside(folder, FILE))
    family_name = raw.get("model_type")
    if not isinstance(family_name, str) or family_name not in config_keys.FAMILIES:
        raise ModelError(
            "unsupported model family",
            where=f"{FILE}, key model_type",
            expected="one of " + ", ".join(config_keys.FAMILIES),
            found=config_keys.shown(family_name),
            mend="Convert a model of a supported family.",
        )
    family = config_keys.FAMILIES[family_name]
    keys = Keys(raw, family.defaults, FILE)
    rope = _rope_keys(keys, family)
    refused = config_keys.refusals(family, raw, FILE)
    if rope.get("rope_type") not in (None, *family.rope_types):
        refused.append(_other_rope(rope, family_name, family))
    config_keys.raise_all(refused)
    return _parse(family_name, keys, rope, read_generation(folder))


def _other_rope(rope: Keys, family_name: str, family: config_keys.Family) -> ModelError:
    return ModelError(
        "rotary embedding of this type is not supported",
        where=f"{FILE}, key rope_type",
        expected=f"one of {', '.join(family.rope_types)} for {family_name}",
        found=config_keys.shown(rope.get("rope_type")),
        mend="Convert a model with one of these types.",
    )


def _parse(family: str, keys: Keys, rope: Keys, generation: Generation) -> ModelConfig:
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim = keys.optional_integer("head_dim")
    if head_dim is None:
        if hidden % heads:
            raise keys.fail("hidden_size", f"a multiple of num_attention_heads ({heads}), or an explicit head_dim")
        head_dim = hidden // heads
    kv_heads = heads if keys.get("num_key_value_heads") is None else keys.integer("num_key_value_heads")
    if heads % kv_heads:
        raise keys.fail("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    context = keys.integer("max_position_embeddings")
    vocab = keys.integer("vocab_size")
    bos, eos, pad = _special_ids(keys, generation, vocab)
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size"),
        num_layers=keys.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=keys.number("rms_norm_eps"),
        rope=_rope(family, rope, head_dim, context),
        context_length=context,
        sliding_window=_sliding_window(keys, context),
        tie_embeddings=keys.boolean("tie_word_embeddings"),
        bos_token_id=bos,
        eos_token_ids=eos,
        pad_token_id=pad,
        notes=tuple(_notes(config_keys.FAMILIES[family], keys, rope)),
    )


def _notes(family: config_keys.Family, keys: Keys, rope: Keys) -> Iterator[str]:
    unread = config_keys.unread_keys(family, keys.raw)
    if unread:
        names = config_keys.listed(unread)
        yield f"{FILE}: ignored, as transformers' config class of {family.causal_lm} declares no such key: {names}"
    if keys.get("use_sliding_window") is False and keys.get("sliding_window") is not None:
        yield f"{FILE}: use_sliding_window is false, so sliding_window is not applied"
    yield from rope.notes


def _special_ids(keys: Keys, generation: Generation, vocab: int) -> tuple[int | None, tuple[int, ...], int | None]:
    def first(stated: int | None, key: str) -> int | None:
        return token_id(keys.get(key), f"{FILE}, key {key}") if stated is None else stated

    bos, pad = first(generation.bos_token_id, "bos_token_id"), first(generation.pad_token_id, "pad_token_id")
    eos = generation.eos_token_ids
    if eos is None:
        eos = token_ids(keys.get("eos_token_id"), f"{FILE}, key eos_token_id") or ()
    for key, ids in (("bos_token_id", (bos,)), ("eos_token_id", eos), ("pad_token_id", (pad,))):
        for each in ids:
            if each is not None and each >= vocab:
                raise ModelError(
                    "special token id is outside the vocabulary",
                    where=f"{key} of generation_config.json or {FILE}",
                    expected=f"below vocab_size ({vocab})",
                    found=str(each),
                    mend="Check that both files belong to this checkpoint.",
                )
    return bos, eos, pad


def _sliding_window(keys: Keys, context: int) -> int | None:
    """The attention window; None where it is switched off, or as long as the context and so never hides anything."""
    used = keys.raw.get("use_sliding_window")
    if used is not None:
        used = keys.boolean("use_sliding_window")
    window = None if used is False else keys.optional_integer("sliding_window")
    types = keys.get("layer_types")
    uniform = "full_attention" if window is None else "sliding_attention"
    if types is not None and (not isinstance(types, list) or any(each != uniform for each in types)):
        raise keys.fail("layer_types", f"{uniform} in every layer, as sliding_window says")
    return None if window is None or window >= context else window


def _rope_keys(keys: Keys, family: config_keys.Family) -> Keys:
    """The rope settings of both spellings in one object: {rope_type, rope_theta, partial_rotary_factor, ...}."""
    merged: dict[str, Json] = {}
    parts: dict[str, Json] = {name: keys.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
    parts["top level"] = {key: keys.raw.get(key) for key in config_keys.ROPE_KEYS_OUTSIDE}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise keys.fail(name, "an object or null")
        for key, value in part.items():
            key = "rope_type" if key == "type" else key
            if key == "rope_type" and isinstance(value, str):
                value = family.rope_aliases.get(value, value)
            if value is None:
                continue
            if merged.setdefault(key, value) != value:
                raise ModelError(
                    "config.json contradicts itself",
                    where=f"{FILE}, key {key}",
                    expected=f"{config_keys.shown(merged[key])}, as stated elsewhere in the file",
                    found=f"{config_keys.shown(value)} ({name})",
                )
    _require_read_by_all(keys, parts)
    notes: tuple[str, ...] = ()
    original, default = "original_max_position_embeddings", family.defaults.get("original_max_position_embeddings")
    if default is not None and keys.raw.get(original) is None and merged.get(original, default) != default:
        stated = config_keys.shown(merged[original])
        notes = (f"{FILE}: {original} is {default}, as transformers takes it, which does not read {stated} inside",)
        merged[original] = default
    return Keys(merged, keys.defaults, f"{FILE}, rope settings", notes)


def _require_read_by_all(keys: Keys, parts: Mapping[str, Json]) -> None:
    """ModelError for what rope_scaling says to transformers 5, and not to 4, which reads it at the top level."""
    scaling, parameters = parts["rope_scaling"], parts["rope_parameters"]
    assert isinstance(scaling, dict) and isinstance(parameters, dict)
    for key in ("rope_theta", "partial_rotary_factor"):
        stated = scaling.get(key)
        if stated in (None, keys.defaults[key]) or keys.raw.get(key) == stated or parameters.get(key) == stated:
            continue
        raise _disagreement(key, f"{key} at the top level, or in rope_parameters", f"{key} in rope_scaling alone")


def _disagreement(key: str, expected: str, found: str) -> ModelError:
    return ModelError(
        "versions of transformers compute this model differently",
        where=f"{FILE}, key {key}",
        expected=expected,
        found=found,
        mend="State what the model was trained with, so that every version reads it.",
    )


def _rope(family: str, rope: Keys, head_dim: int, context: int) -> Rope:
    partial = config_keys.FAMILIES[family].partial_rotary
    name = rope.get("rope_type") or RopeKind.DEFAULT.value
    kind = RopeKind(name)
    config_keys.check_rope_keys(kind.value, rope.raw, rope.where)
    rotated = int(head_dim * rope.number("partial_rotary_factor"))
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise rope.fail("partial_rotary_factor", f"an even number of rotated dimensions, at most head_dim ({head_dim})")
    if rotated != head_dim and not partial:
        raise rope.fail("partial_rotary_factor", f"1.0: {family} rotates whole heads")
    theta = rope.number("rope_theta")
    if kind is RopeKind.LINEAR:
        return Rope(kind, theta, rotated, factor=rope.number("factor"))
    if kind is RopeKind.LLAMA3:
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.fail("low_freq_factor", f"less than high_freq_factor ({high})")
        return Rope(
            kind, theta, rotated, rope.number("factor"), low, high, rope.integer("original_max_position_embeddings")
        )
    if kind is RopeKind.LONGROPE:
        return _longrope(rope, theta, rotated, context)
    return Rope(kind, theta, rotated)


def _longrope(rope: Keys, theta: float, rotated: int, context: int) -> Rope:
    """LongRoPE (Ding et al. 2024) as transformers reads it for Phi-3.

    Without an explicit `attention_factor` cos and sin are multiplied by sqrt(1 + ln(factor) / ln(original context)), or
    by 1 if the context was not extended. transformers 4 takes context / original context for the factor, transformers 5
    a `factor` that is stated: ModelError if that makes a difference.
    """
    original = rope.integer("original_max_position_embeddings", 2)
    factor = context / original
    if rope.get("attention_factor") is not None:
        attention_factor = rope.number("attention_factor")
    else:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        stated = factor if rope.get("factor") is None else rope.number("factor")
        if max(stated, factor) > 1 and not math.isclose(stated, factor, rel_tol=1e-6):
            ratio = f"max_position_embeddings / original_max_position_embeddings, {factor:g}"
            raise _disagreement("factor", f"{ratio}, or an attention_factor", f"{stated:g}")
    return Rope(
        RopeKind.LONGROPE,
        theta,
        rotated,
        factor=factor,
        original_context=original,
        attention_factor=attention_factor,
        short_factors=rope.numbers("short_factor", rotated // 2),
        long_factors=rope.numbers("long_factor", rotated // 2),
    )
