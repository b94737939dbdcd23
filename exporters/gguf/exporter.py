"""GGUF: one file for llama.cpp and what is built on it (Ollama, LM Studio)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from converters.chat_template import variables
from converters.errors import ModelError
from converters.quantize.tensor import F32
from exporters.base import Card, Difference, Layout, Model, Runtime, Semantics, Target, TargetOptions, TensorRow
from exporters.gguf import examine
from exporters.gguf.modelfile import MODELFILE, modelfile
from exporters.options import GgufOptions
from exporters.schemes import require_family

FILE = "model.gguf"
_USAGE = f"""\
    llama-cli -m {FILE}
    ollama create my-model -f {MODELFILE} && ollama run my-model

LM Studio and whatever else is built on llama.cpp open `{FILE}` as it is."""


DATED = Difference(
    "chat-date",
    "llama.cpp gives the chat template today's date as date_string, which transformers leaves out: the model is told "
    "today's date in place of the template's own.",
    "chat",
    lambda conversation: True,
)


class GgufExporter:
    """The container of llama.cpp. gguf and xllamacpp are imported only when a method needs them."""

    target = Target.GGUF
    options: type[TargetOptions] = GgufOptions
    requires: tuple[str, ...] = ("gguf",)
    runtime_requires: tuple[str, ...] = ("gguf", "xllamacpp")
    extra = "gguf"
    card = Card("gguf", "llama.cpp", ("gguf", "llama.cpp", "ollama"), _USAGE)

    def check(self, model: Model, options: TargetOptions) -> None:
        """UsageError for families and schemes that GGUF has no name for, ModelError for shapes that llama.cpp lacks."""
        from exporters.gguf.tensors import ARCHITECTURES, gguf_tensors

        require_family(model, self.target, ARCHITECTURES)
        config = model.graph.config
        if config.family == "phi3":
            width = config.num_heads * config.head_dim
            _require("phi3 in llama.cpp: heads span the hidden size", width, config.hidden_size)
        else:
            _require("llama in llama.cpp: all of a head is rotated", config.rope.dim, config.head_dim)
        gguf_tensors(model.graph)

    def layout(self, model: Model, options: TargetOptions) -> Layout:
        """One file: header, metadata, tensor table, then the tensors at multiples of 32 bytes. Ollama's Modelfile."""
        from exporters.gguf.layout import gguf_layout

        return replace(gguf_layout(model, FILE), small={MODELFILE: modelfile(model, FILE)})

    def semantics(self, model: Model, options: TargetOptions) -> Semantics:
        """How llama.cpp, opening this file, treats the context limit and the sliding window."""
        from exporters.gguf.context import semantics

        return semantics(model)

    def differences(self, model: Model, options: TargetOptions) -> tuple[Difference, ...]:
        """What llama.cpp does otherwise with this tokenizer's texts and template, whatever the file says."""
        from exporters.gguf.differences import tokenizer_differences

        template = model.tokenizer.chat_template
        names = frozenset() if template is None else variables(template)
        # A template that asks for the date itself gets the same one.
        dated = (DATED,) if "date_string" in names and "strftime_now" not in names else ()
        return (*tokenizer_differences(model.tokenizer), *dated)

    def read_back(self, folder: Path, model: Model) -> Iterator[tuple[str, F32]]:
        """Every matrix as gguf-py's reader sees it, by canonical name."""
        from exporters.gguf.read import read_weights

        return read_weights(folder / FILE, model.graph)

    def open(self, folder: Path, options: TargetOptions) -> Runtime:
        """The file in llama.cpp, on the CPU, with a float32 KV cache and without flash attention."""
        from exporters.gguf.runtime import LlamaCpp

        return LlamaCpp(folder / FILE)

    def tensors(self, folder: Path) -> Iterator[TensorRow]:
        """What GGUFReader finds in the folder's files."""
        return examine.tensors(folder)

    def devices(self) -> list[str]:
        """llama.cpp's devices."""
        return examine.devices()


def _require(rule: str, found: int, expected: int) -> None:
    if found != expected:
        raise ModelError(
            "llama.cpp cannot run a model of this shape",
            where=rule,
            expected=str(expected),
            found=str(found),
            mend="Leave gguf out of the recipe's targets.",
        )


EXPORTER = GgufExporter()
