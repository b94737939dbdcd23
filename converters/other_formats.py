"""What looks like a checkpoint of floats and is none: adapters, and weights that are quantized already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from converters.errors import ModelError
from converters.json_file import Json, inside, read_json

ADAPTER, CONFIG = "adapter_config.json", "config.json"

_KEYS = ("quantization_config", "quantization", "compression_config")  # transformers', MLX's, an early one of vLLM's
_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "auto-round": "AutoRound",
}
_BITS = ("bits", "num_bits", "nbits", "w_bit", "wbits")
_GROUPS = ("group_size", "q_group_size", "weight_block_size")
_OF_ACTIVATIONS = ("input_activations", "output_activations", "kv_cache_scheme")
_DEPTH = 6  # where configs say something of weights
# What a format's config leaves out, since it has no other.
_BITS_OF = {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4}
_GROUPS_OF = {"mxfp4": 32}
_ONE_SCALE = {"channel": -1, "tensor": 0}  # strategies of compressed-tensors that state no group
_BNB_BLOCK = 64  # bitsandbytes' default, which configs do not state

_SHOWN = 120  # characters of what a stranger's file states

_MEND = "Convert the original, unquantized checkpoint."


def refuse_other_formats(folder: Path) -> None:
    """ModelError if the folder holds an adapter, or config.json says that its weights are quantized."""
    if (folder / ADAPTER).is_file():
        raise _adapter(folder)
    if not (folder / CONFIG).is_file():
        return
    raw = read_json(inside(folder, CONFIG))
    for key in _KEYS:
        settings = raw.get(key)
        if settings is not None:
            found = describe(settings if isinstance(settings, dict) else {})
            where = f"{CONFIG}, key {key}"
            raise ModelError("the checkpoint is already quantized", where=where, found=found, mend=_MEND)


def _adapter(folder: Path) -> ModelError:
    """transformers, too, takes a folder with an adapter for its base model with the adapter put on."""
    raw = read_json(inside(folder, ADAPTER))
    base, kind = raw.get("base_model_name_or_path"), raw.get("peft_type")
    name = base if isinstance(base, str) and base else "its base model"
    return ModelError(
        "the folder holds an adapter, not a model",
        where=ADAPTER,
        expected="the weights of a whole model",
        found=f"an adapter{f' ({kind})' if isinstance(kind, str) else ''} of {name}",
        mend=f"Merge it into {name} by peft's merge_and_unload, save that with save_pretrained, and convert what was "
        "saved. If the folder has the whole model too, move the adapter's files out of it.",
    )


def describe(settings: Mapping[str, Json]) -> str:
    """A quantization's format, bits and group, as its config states them."""
    stated = settings.get("quant_method")
    method = stated.lower() if isinstance(stated, str) else ""
    name = _NAMES.get(method, stated) if isinstance(stated, str) else "quantized weights (no quant_method is stated)"
    if method == "bitsandbytes":
        return _bitsandbytes(settings)
    bits = next(_values(settings, _BITS), _BITS_OF.get(method))
    group = next(_values(settings, _GROUPS), _GROUPS_OF.get(method))
    if group is None:
        strategy = next(_values(settings, ("strategy",)), None)
        group = _ONE_SCALE.get(strategy) if isinstance(strategy, str) else None
    layout = settings.get("format")
    return _told(f"{name} ({layout})" if isinstance(layout, str) else str(name), bits, group)


def _bitsandbytes(settings: Mapping[str, Json]) -> str:
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        kind = settings.get("bnb_4bit_quant_type")
        return _told(f"bitsandbytes ({kind})" if isinstance(kind, str) else "bitsandbytes", 4, _BNB_BLOCK)
    return _told("bitsandbytes", 8, -1)


def _told(name: str, bits: Json, group: Json) -> str:
    parts = [name]
    if bits is not None:
        parts.append(f"{bits} bits")
    if isinstance(group, list):
        parts.append(f"blocks of {'×'.join(map(str, group))}")
    elif group == -1:
        parts.append("a scale a row")
    elif group == 0:
        parts.append("a scale a matrix")
    elif group is not None:
        parts.append(f"groups of {group}")
    text = ", ".join(parts)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _values(settings: Mapping[str, Json], names: Iterable[str], depth: int = _DEPTH) -> Iterator[Json]:
    """What is stated by one of these names, the outermost first; not what is stated of activations."""
    yield from (settings[name] for name in names if settings.get(name) is not None)
    for key, inner in settings.items():
        if isinstance(inner, dict) and depth and key not in _OF_ACTIVATIONS:
            yield from _values(inner, names, depth - 1)


def quantized_tensors(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The format whose tensors these look like, with bits and group where shapes tell them; None for no known one."""
    for name, shape in shapes.items():
        stem, _, kind = name.rpartition(".")
        scales, index = shapes.get(f"{stem}.scales"), shapes.get(f"{stem}.g_idx")
        if kind == "qweight" and shape and scales and index:  # [in · bits / 32, out], scales [in / group, out]
            return _told("GPTQ", 32 * shape[0] // max(index[0], 1), index[0] // max(scales[0], 1))
        if kind == "qweight" and shape and scales:  # [in, out · bits / 32], scales [in / group, out]
            return _told("AWQ", 32 * shape[-1] // max(scales[-1], 1), shape[0] // max(scales[0], 1))
        if kind == "weight_packed":
            return "compressed-tensors"
        if "quant_state" in name or kind == "absmax":
            return _told("bitsandbytes", 4, None)
        if kind == "SCB":
            return _told("bitsandbytes", 8, -1)
        if kind == "weight_scale_inv":
            return _told("FP8", 8, None)
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in shapes:
            return _told("MXFP4", 4, 32)
        if kind == "scales" and f"{stem}.biases" in shapes:
            return "MLX's affine quantization"
    return None


def unsupported_type(
    where: str, stored: str, supported: Iterable[str], shapes: Mapping[str, tuple[int, ...]]
) -> ModelError:
    """What is said of a tensor whose type is no float that models are published in; `shapes` are its file's."""
    expected = ", ".join(supported)
    known = quantized_tensors(shapes) or (_told("FP8", 8, None) if stored.startswith("F8_") else None)
    if known is not None:
        found = f"{stored}, as in {known}"
        return ModelError(
            "the checkpoint is already quantized", where=where, expected=expected, found=found, mend=_MEND
        )
    mend = "If the checkpoint is quantized, convert the original one."
    return ModelError("tensor type is not supported", where=where, expected=expected, found=stored, mend=mend)
