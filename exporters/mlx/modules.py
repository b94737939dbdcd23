"""How a graph's weights become mlx modules: paths, fused projections, schemes, activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from converters.errors import UsageError
from converters.graph import Graph, Weight
from converters.quantize.scheme import BF16, FP16, FP32, Scheme
from converters.quantize.tensor import U8, Tensor
from converters.role import Role
from exporters.base import Activations, TargetOptions
from exporters.floats import pack_floats
from exporters.mlx.pack import DTYPES, group_size_for, pack_biases, pack_codes, pack_scales

# Module paths by the last part of a weight's name: mlx_lm/models/llama.py, and what phi3.py fuses.
PATHS = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp_gate": "mlp.gate_proj",
    "mlp_up": "mlp.up_proj",
    "mlp_down": "mlp.down_proj",
}
PHI3_PATHS = PATHS | {
    "attn_q": "self_attn.qkv_proj",
    "attn_k": "self_attn.qkv_proj",
    "attn_v": "self_attn.qkv_proj",
    "mlp_gate": "mlp.gate_up_proj",
    "mlp_up": "mlp.gate_up_proj",
}

# The safetensors dtype of a float scheme.
FLOAT_DTYPES = {FP32: "F32", FP16: "F16", BF16: "BF16"}
SCHEMES = {Activations.FP32: FP32, Activations.FP16: FP16, Activations.BF16: BF16}


@dataclass(frozen=True, slots=True)
class Module:
    """One mlx module and the weights stacked in it along the output axis."""

    path: str
    weights: tuple[Weight, ...]

    @property
    def scheme(self) -> Scheme:
        """The scheme of its first weight: after check_module, bits and float type are those of all."""
        return self.weights[0].scheme

    @property
    def quantization(self) -> dict[str, int] | None:
        """mlx-lm's {group_size, bits}, or None for floats. Fused weights take the smallest of their group sizes."""
        if not self.scheme.is_integer:
            return None
        sizes = [group_size_for(weight.scheme.group_size or 0, weight.shape[-1]) for weight in self.weights]
        return {"group_size": min(size for size in sizes if size is not None), "bits": self.scheme.bits}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the safetensors files; rows of the module's weights follow one another."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    row_nbytes: int
    pack: Callable[[Tensor], U8]
    weights: tuple[Weight, ...]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_nbytes


def find_modules(graph: Graph) -> list[Module]:
    """Every module that holds weights, in execution order."""
    stacked: dict[str, list[Weight]] = {}
    for name in dict.fromkeys(name for node in graph.nodes for name in node.op.weights):
        stacked.setdefault(module_path(name, graph.config.family), []).append(graph.weights[name])
    return [Module(path, tuple(weights)) for path, weights in stacked.items()]


def module_path(weight: str, family: str) -> str:
    """blocks.3.attn_q -> model.layers.3.self_attn.qkv_proj (phi3) or ….q_proj (llama)."""
    paths = PHI3_PATHS if family == "phi3" else PATHS
    if not weight.startswith("blocks."):
        return paths[weight]
    _, layer, name = weight.split(".")
    return f"model.layers.{layer}.{paths[name]}"


def chosen_activations(graph: Graph, options: TargetOptions) -> Activations:
    """What the options ask for. Else fp16 for a quantized model, and the type of the matrices for one in floats."""
    if options.activations is not None:
        return options.activations
    schemes = {weight.scheme for weight in graph.weights.values() if weight.role is not Role.NORM}
    if any(scheme.is_integer for scheme in schemes):
        return Activations.FP16
    return next((kind for kind, scheme in SCHEMES.items() if schemes == {scheme}), Activations.FP32)


def check_module(module: Module, activations: Activations) -> None:
    """UsageError if MLX cannot hold the module's weights as one, or would not compute in `activations`.

    mlx promotes types as it goes: fp16 with bf16 or with fp32 gives fp32. So everything that is multiplied is stored in
    the activations' type, except that fp32 activations take weights of any type.
    """
    kinds = {(weight.scheme.type, weight.scheme.bits) for weight in module.weights}
    if len(kinds) > 1:
        found = ", ".join(f"{weight.role.value}: {weight.scheme.name}" for weight in module.weights)
        raise UsageError(
            "MLX holds these weights as one matrix of one number type",
            where=f"target mlx, {module.path}",
            expected="the same bits for all of them",
            found=found,
            mend="Give these roles schemes of equal bits in the recipe.",
        )
    for weight in module.weights:
        _check_weight(weight, activations)


def _check_weight(weight: Weight, activations: Activations) -> None:
    scheme, where = weight.scheme, f"target mlx, role {weight.role.value}"
    if weight.role is Role.NORM or (activations is Activations.FP32 and not scheme.is_integer):
        return
    if scheme.is_integer:
        if group_size_for(scheme.group_size or 0, weight.shape[-1]) is None or scheme.bits not in (4, 8):
            raise UsageError(
                "MLX cannot hold this scheme",
                where=where,
                expected="4 or 8 bits in groups that 32 divides",
                found=f"{scheme.name} over rows of {weight.shape[-1]}",
                mend="Choose fp16 for this role.",
            )
        if activations is Activations.BF16:
            raise UsageError(
                "MLX computes quantized weights with fp16 scales in fp32 when activations are bf16, and bf16 scales"
                " would change the weights",
                where=where,
                expected="activations fp16 or fp32",
                found="bf16",
                mend="Set the target's activations to fp16, or leave them out.",
            )
    elif scheme != SCHEMES[activations]:
        raise UsageError(
            "MLX computes in the type of the weights, which is not that of the activations asked for",
            where=where,
            expected=f"scheme {SCHEMES[activations].name} for activations {activations}",
            found=scheme.name,
            mend="Set the target's activations to fp32, or choose that scheme for this role.",
        )


def stored_tensors(module: Module, activations: Activations) -> Iterator[StoredTensor]:
    """The tensors of a module: weight, and scales and biases where it is quantized."""
    rows = sum(weight.shape[0] for weight in module.weights)
    width = module.weights[0].shape[1:]
    float_dtype = FLOAT_DTYPES[SCHEMES[activations]]

    def stored(name: str, dtype: str, columns: tuple[int, ...], pack: Callable[[Tensor], U8]) -> StoredTensor:
        row_nbytes = DTYPES[dtype].itemsize * (columns[0] if columns else 1)
        return StoredTensor(f"{module.path}.{name}", dtype, (rows, *columns), row_nbytes, pack, module.weights)

    quantization = module.quantization
    if quantization is None:
        dtype = float_dtype if module.weights[0].role is Role.NORM else FLOAT_DTYPES[module.scheme]
        where = f"target mlx, {module.path}"
        yield stored("weight", dtype, width, partial(pack_floats, dtype=DTYPES[dtype], where=where))
        return
    size, bits = quantization["group_size"], quantization["bits"]
    groups = (width[0] // size,)
    yield stored("weight", "U32", (width[0] * bits // 32,), pack_codes)
    yield stored("scales", float_dtype, groups, partial(pack_scales, group_size=size, dtype=float_dtype))
    yield stored("biases", float_dtype, groups, partial(pack_biases, group_size=size, dtype=float_dtype))


def quantization_config(modules: Sequence[Module]) -> Mapping[str, object] | None:
    """mlx-lm's `quantization`: the most frequent group size and bits, and the modules that differ by path."""
    found = {module.path: module.quantization for module in modules}
    quantized = {path: quantization for path, quantization in found.items() if quantization is not None}
    if not quantized:
        return None
    counts = Counter((each["group_size"], each["bits"]) for each in quantized.values())
    group_size, bits = counts.most_common(1)[0][0]
    default = {"group_size": group_size, "bits": bits}
    different = {path: each for path, each in quantized.items() if each != default}
    return {**default, "mode": "affine", **different}
