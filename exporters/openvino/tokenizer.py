"""Tokenizer and detokenizer as OpenVINO models, converted from the checkpoint's files by openvino-tokenizers."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import openvino as ov
import openvino_tokenizers
from tokenizers import Regex, Tokenizer, pre_tokenizers

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing is as intended
from transformers import AutoTokenizer

from converters.errors import ModelError
from exporters.openvino.corrections import correct_detokenizer, correct_tokenizer
from exporters.openvino.ir import scratch_errors

TOKENIZER = "openvino_tokenizer"
DETOKENIZER = "openvino_detokenizer"

_COUNTED = re.compile(r"[A-Za-z][A-Za-z0-9]*_[0-9]+(\.[0-9]+)?")
_WRITTEN = "the tokenizer's models"


def convert_tokenizer(files: dict[str, bytes], config: bytes) -> dict[str, bytes]:
    """The four files of the two models. `config` is config.json, which names the class where the files do not."""
    with scratch_errors(_WRITTEN):
        scratch = tempfile.TemporaryDirectory()
    with scratch as name:
        folder = Path(name)
        with scratch_errors(_WRITTEN):
            for file, data in (files | {"config.json": config}).items():
                (folder / file).write_bytes(data)
        models = _convert(folder)
        return {
            file: data
            for stem, model in zip((TOKENIZER, DETOKENIZER), models, strict=True)
            for file, data in _serialize(model, stem, folder).items()
        }


def _convert(folder: Path) -> tuple[ov.Model, ov.Model]:
    """The two models of the tokenizer in a folder; what goes wrong in the libraries that read it is its fault."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if tokenizer.is_fast:
            _keep_byte_names_apart(tokenizer.backend_tokenizer)
        encoder, decoder = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise ModelError(
            "the tokenizer cannot be made into OpenVINO models",
            where="target openvino, the tokenizer's files",
            expected="a tokenizer that transformers opens and openvino-tokenizers converts",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            mend="Leave openvino out of the targets, or take a checkpoint that the two libraries know.",
        ) from error
    correct_tokenizer(encoder, tokenizer.added_tokens_decoder.values())
    correct_detokenizer(decoder)
    return encoder, decoder


def _keep_byte_names_apart(backend: Tokenizer) -> None:
    """Split texts inside what looks like the name of a byte token, such as <0x41>.

    Before it merges, openvino-tokenizers' BPE takes the longest vocabulary entries that no merge makes, and so reads
    that text as the byte. SentencePiece vocabularies have no token with "<0" inside, so that a cut between the two
    characters changes nothing else.
    """
    if not getattr(backend.model, "byte_fallback", False):
        return
    cut = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous")
    steps = [cut] if backend.pre_tokenizer is None else [backend.pre_tokenizer, cut]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)


def _serialize(model: ov.Model, stem: str, folder: Path) -> dict[str, bytes]:
    _renumber(model)
    paths = [folder / f"{stem}.xml", folder / f"{stem}.bin"]
    with scratch_errors(_WRITTEN):
        ov.serialize(model, *paths)
        data = {path.name: path.read_bytes() for path in paths}
        if not data[paths[0].name].rstrip().endswith(b"</net>"):
            raise OSError("the file is cut off")
    return data


def _renumber(model: ov.Model) -> None:
    """Numbers in names from the nodes' order: OpenVINO counts them over the life of the process."""
    for index, node in enumerate(model.get_ordered_ops()):
        if _COUNTED.fullmatch(node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{index}")
        for output in node.outputs():
            names = output.get_tensor().get_names()
            kept = {name for name in names if not _COUNTED.fullmatch(name)}
            if kept != names:
                output.get_tensor().set_names(kept or {node.get_friendly_name()})
