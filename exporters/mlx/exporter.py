"""The MLX container: safetensors and a config.json that mlx_lm.load opens as they are. Needs no mlx to write."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from converters.errors import ModelError
from converters.quantize.tensor import F32
from converters.role import Role
from exporters.base import (
    BigFile,
    Card,
    Difference,
    Layout,
    Model,
    Place,
    Runtime,
    Semantics,
    Target,
    TargetOptions,
    TensorRow,
)
from exporters.mlx.config import check_config, model_config, semantics
from exporters.mlx.examine import devices, tensors
from exporters.mlx.modules import (
    StoredTensor,
    check_module,
    chosen_activations,
    find_modules,
    quantization_config,
    stored_tensors,
)
from exporters.mlx.pack import DTYPES
from exporters.options import MlxOptions
from exporters.schemes import refuse_ggml_schemes
from exporters.transformers_files import encode_json, generation_config, tokenizer_files

_USAGE = """\
    pip install mlx-lm
    mlx_lm.generate --model . --max-tokens 100 --prompt 'What is the capital of France?'

For Apple silicon. On the CPUs of other machines MLX opens it as well, and takes minutes for a word."""

SHARD_NBYTES = 5 << 30  # mlx-lm's own limit for one file (mlx_lm.utils.MAX_FILE_SIZE_GB)


class MlxExporter:
    """Implements exporters.base.Exporter."""

    target = Target.MLX
    options: type[TargetOptions] = MlxOptions
    requires: tuple[str, ...] = ()
    runtime_requires: tuple[str, ...] = ("mlx", "mlx_lm")
    extra = "mlx"
    card = Card("mlx", "mlx-lm", ("mlx",), _USAGE)

    def check(self, model: Model, options: TargetOptions) -> None:
        """UsageError if mlx-lm cannot compute this model, or MLX cannot store these schemes with these activations."""
        refuse_ggml_schemes(model, self.target)
        check_config(model)
        activations = chosen_activations(model.graph, options)
        for module in find_modules(model.graph):
            check_module(module, activations)
        if not {"tokenizer.json", "tokenizer.model"} & model.tokenizer.files.keys():
            raise ModelError(
                "mlx-lm reads the checkpoint's own tokenizer files",
                where="target mlx",
                expected="tokenizer.json or tokenizer.model",
                found=", ".join(model.tokenizer.files) or "no file",
            )

    def layout(self, model: Model, options: TargetOptions) -> Layout:
        """Places of all tensors, in files of at most 5 GiB as mlx-lm shards them."""
        self.check(model, options)
        activations = chosen_activations(model.graph, options)
        modules = find_modules(model.graph)
        stored = [tensor for module in modules for tensor in stored_tensors(module, activations)]
        shards = split_shards(stored, SHARD_NBYTES)
        big: dict[str, BigFile] = {}
        places: dict[str, list[Place]] = {name: [] for name in model.graph.weights}
        for name, shard in shards.items():
            big[name] = _lay_out_file(name, shard, places)
        small = {
            "config.json": encode_json(model_config(model, activations, quantization_config(modules))),
            "generation_config.json": encode_json(generation_config(model)),
            "model.safetensors.index.json": encode_json(_index(shards)),
        }
        return Layout(big, places, tokenizer_files(model) | small)

    def semantics(self, model: Model, options: TargetOptions) -> Semantics:
        return semantics(model)

    def differences(self, model: Model, options: TargetOptions) -> tuple[Difference, ...]:
        return ()

    def read_back(self, folder: Path, model: Model) -> Iterator[tuple[str, F32]]:
        """Matrices as mlx loads and dequantizes them in float32, one module at a time."""
        from exporters.mlx.runtime import MatrixReader

        reader = MatrixReader(folder)
        for module in find_modules(model.graph):
            if module.weights[0].role is Role.NORM:
                continue
            matrix, start = reader.read(module.path), 0
            for weight in module.weights:
                yield weight.name, matrix[start : start + weight.shape[0]]
                start += weight.shape[0]

    def open(self, folder: Path, options: TargetOptions) -> Runtime:
        """The folder opened by mlx_lm.load, which has no approximations of its own to turn off."""
        from exporters.mlx.runtime import MlxRuntime

        return MlxRuntime(folder)

    def tensors(self, folder: Path) -> Iterator[TensorRow]:
        return tensors(folder)

    def devices(self) -> list[str]:
        return devices()


EXPORTER = MlxExporter()


def split_shards(tensors: Sequence[StoredTensor], limit: int) -> dict[str, list[StoredTensor]]:
    """Files of at most `limit` bytes of tensors each (a larger tensor has a file of its own), by name, in order."""
    shards: list[list[StoredTensor]] = [[]]
    nbytes = 0
    for tensor in tensors:
        if shards[-1] and nbytes + tensor.nbytes > limit:
            shards.append([])
            nbytes = 0
        shards[-1].append(tensor)
        nbytes += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _lay_out_file(name: str, tensors: Sequence[StoredTensor], places: Mapping[str, list[Place]]) -> BigFile:
    """One safetensors file: u64 header length, JSON header padded to 8 bytes, data without gaps.

    Tensors of whole words come first, so that every one is aligned to its own size. Otherwise they stay in their order:
    the file then grows from start to end during a pour.
    """
    word = max(DTYPES[tensor.dtype].itemsize for tensor in tensors)
    whole = [tensor for tensor in tensors if tensor.nbytes % word == 0]
    others = [tensor for tensor in tensors if tensor.nbytes % word]
    ordered = whole + sorted(others, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    starts: list[int] = []
    end = 0
    for tensor in ordered:
        starts.append(end)
        end += tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [starts[-1], end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    base = 8 + len(header)
    for tensor, start in zip(ordered, starts, strict=True):
        offset = base + start
        for weight in tensor.weights:
            places[weight.name].append(Place(name, offset, tensor.row_nbytes, tensor.pack))
            offset += weight.shape[0] * tensor.row_nbytes
    return BigFile(base + end, ((0, len(header).to_bytes(8, "little") + header),))


def _index(shards: Mapping[str, Sequence[StoredTensor]]) -> dict[str, object]:
    """model.safetensors.index.json, which mlx-lm writes for a single file too."""
    files = {tensor.name: (name, tensor.nbytes) for name, shard in shards.items() for tensor in shard}
    return {
        "metadata": {"total_size": sum(nbytes for _, nbytes in files.values())},
        "weight_map": {tensor: files[tensor][0] for tensor in sorted(files)},
    }
