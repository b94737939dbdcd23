"""Where every byte of the file lies. GGUF version 3: header, key-values, tensor table, tensors at multiples of 32."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFWriter
from gguf.gguf_writer import WriterState

from converters.quantize.scheme import Scheme
from exporters.base import BigFile, Layout, Model, Place
from exporters.gguf.entry import Entry
from exporters.gguf.metadata import metadata
from exporters.gguf.pack import interleaving, packer
from exporters.gguf.tensors import GgufTensor, architecture, gguf_tensors
from exporters.gguf.vocab import tokenizer_metadata


def gguf_layout(model: Model, file: str) -> Layout:
    """The layout of an artifact of one file of that name."""
    tensors = gguf_tensors(model.graph)
    entries = [*metadata(model, tensors), *tokenizer_metadata(model.tokenizer)]
    header = header_bytes(architecture(model.graph), entries, tensors)
    fixed = [(0, header)]
    places: dict[str, list[Place]] = {}
    offset = len(header)
    for tensor in tensors:
        if tensor.constant is not None:
            fixed.append((offset, tensor.constant.astype("<f4").tobytes()))
        start = offset
        for part in tensor.parts:
            places[part.name] = [_place(tensor, part.scheme, file, start)]
            start += part.shape[0] * tensor.row_nbytes
        offset = _aligned(offset + tensor.nbytes)
    return Layout(big={file: BigFile(offset, tuple(fixed))}, places=places, small={})


def _place(tensor: GgufTensor, scheme: Scheme, file: str, offset: int) -> Place:
    pack = packer(scheme)
    if tensor.head_dim is None:
        return Place(file, offset, tensor.row_nbytes, pack)
    return Place(file, offset, tensor.row_nbytes, interleaving(pack, tensor.head_dim), tensor.head_dim)


def _aligned(offset: int) -> int:
    return -(-offset // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def header_bytes(arch: str, entries: Sequence[Entry], tensors: Sequence[GgufTensor]) -> bytes:
    """Everything before the first tensor, padded to where it begins."""
    writer, memory = GGUFWriter(None, arch), io.BytesIO()
    for entry in entries:
        if entry.key != "general.architecture":  # the writer has added it already
            writer.add_key_value(entry.key, entry.value, entry.type, entry.item)
    for tensor in tensors:
        # The writer looks at the numpy dtype only where no GGML type is given.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
    # As it opens a file, but for the file: a temporary folder may be full.
    writer.fout, writer.state = [io.BufferedWriter(memory)], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    header = memory.getvalue()
    return header.ljust(_aligned(len(header)), b"\0")
