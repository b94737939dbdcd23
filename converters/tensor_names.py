"""The names of a checkpoint's tensors: wrappers that programs leave in them, and buffers that are no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping

from converters.checkpoint import LazyTensor
from converters.errors import ModelError

# Modules that torch.compile, FSDP and activation checkpointing put around others, wherever they do.
_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = ("base_model.model.", "module.")  # of peft, and of DataParallel
_INNER = "model."  # the model inside of a causal language model, as transformers names it
_OF_INNER = ("embed_tokens.", "layers.", "norm.", "rotary_emb.")
_ROTARY = re.compile(r"\brotary_emb\.(?:\w+_)?(?:inv_freq|cached)$")


def canonical(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors by the names that transformers' causal language models have; unknown spellings stay as they are.

    ModelError if two come to the same.
    """
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        plain = canonical_name(name)
        if plain in found:
            raise ModelError(
                "two tensors of the checkpoint are the same one",
                where=plain,
                found=f"{found[plain].name} and {name}",
                mend="Save the model again by transformers' save_pretrained.",
            )
        found[plain] = tensor
    return found


def canonical_name(name: str) -> str:
    """`_orig_mod.model.norm.weight`, `base_model.model.model.norm.weight` and `norm.weight` are `model.norm.weight`."""
    plain = _WRAPPERS.sub("", name)
    stripped = True
    while stripped:
        stripped = False
        for prefix in _OUTER:
            if plain.startswith(prefix):
                plain, stripped = plain.removeprefix(prefix), True
    return _INNER + plain if plain.startswith(_OF_INNER) else plain


def is_rotary_buffer(name: str) -> bool:
    """Whether it follows from config.json: frequencies, or their cosines and sines."""
    return _ROTARY.search(name) is not None
