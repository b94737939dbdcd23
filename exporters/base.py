"""What every exporter provides: capabilities, a layout, packing, and the way back through its own runtime.

An exporter states the place of every byte before any weight is read (`Layout`); the job then reads and quantizes each
weight once, in blocks of rows, and hands the block to every exporter's packing functions. Exporters never see one
another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from exporters.card import Card as Card
from exporters.options import Activations as Activations
from exporters.options import TargetOptions as TargetOptions
from exporters.target import Target as Target

if TYPE_CHECKING:  # what an exporter handles; importing this module needs none of it
    from converters.graph import Graph
    from converters.quantize.tensor import F32, U8, Tensor
    from converters.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Model:
    """What an exporter needs to know: the graph with schemes assigned, the tokenizer, and how the model was published.

    `context_length` is the recipe's context, at most the model's. `sampling` holds generation_config.json's defaults
    (temperature, top_k, top_p, do_sample), `name` a human title such as "Phi-3.5-mini-instruct", `licence` its SPDX id
    if the model card states one. `mix` names the mix of GGML types that chose the schemes, if one did.
    """

    graph: Graph
    tokenizer: Tokenizer
    context_length: int
    name: str
    licence: str | None = None
    sampling: Mapping[str, float | int | bool] = field(default_factory=dict)
    mix: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows of one weight go: row r starts at byte `offset + r * row_nbytes` of `file`.

    `pack` turns a block of rows, [n, in] quantized or float ([n] for norms), into u8[n * row_nbytes]. Blocks start and
    end at multiples of `row_multiple` rows: packing may reorder rows within such a block.
    """

    file: str
    offset: int
    row_nbytes: int
    pack: Callable[[Tensor], U8]
    row_multiple: int = 1


@dataclass(frozen=True, slots=True)
class BigFile:
    """A file that holds weights: its exact size, and the (offset, bytes) that are known before any weight is read."""

    nbytes: int
    fixed: Sequence[tuple[int, bytes]] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """Every byte of an artifact folder. `places` has each weight of the graph, by name, at least once."""

    big: Mapping[str, BigFile]
    places: Mapping[str, Sequence[Place]]
    small: Mapping[str, bytes]  # complete small files by their path in the folder

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.big.values()) + sum(len(data) for data in self.small.values())


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer: the ids after the prompt, the text without special tokens, and whether a stop token ended it."""

    token_ids: tuple[int, ...]
    text: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class TensorRow:
    """A tensor as a container stores it: for people to look at, with the container's own names."""

    file: str
    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    shares: str | None = None  # the tensor named before whose bytes these are


@dataclass(frozen=True, slots=True)
class Semantics:
    """How an artifact treats its context: a sentence for the manifest, and the length up to which sequences are
    computed as the model computes them in this context."""

    sentence: str
    exact_to: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A kind of text that a container cannot hold as the model's own tokenizer does, however its files are written.

    `name` is short and stable, for manifests; `sentence` tells a user what happens to which text. `applies` says
    whether a text is of this kind; of a chat the text is JSON, an object with messages and tools. Verification counts
    such texts apart; any other that differs fails.
    """

    name: str
    sentence: str
    of: Literal["encoding", "decoding", "chat"]
    applies: Callable[[str], bool]

    def record(self) -> dict[str, str]:
        """As manifests hold it."""
        return {"name": self.name, "of": self.of, "sentence": self.sentence}


class Runtime(Protocol):
    """An artifact opened in the runtime it was made for. Verification gives it a process of its own.

    `note` tells in the manifest what is not computed by the runtime itself; empty if all of it is.
    """

    note: str

    def logits(self, token_ids: Sequence[int]) -> F32:
        """f32[length, vocab] for one sequence from position 0, computed afresh."""
        ...

    def continued(self, pieces: Sequence[Sequence[int]]) -> F32:
        """f32[length, vocab] as `logits` has it, for a sequence that is read piece after piece from an empty cache."""
        ...

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[F32]:
        """f32[length, vocab] of each sequence, computed together: all but their last tokens, padded as the runtime
        does it where they have other lengths, then the last ones, from what is cached."""
        ...

    def as_opened(self, token_ids: Sequence[int]) -> F32:
        """As `logits`, but with the types and approximations that the runtime has when users open the artifact."""
        ...

    def converse(self, turns: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Greedy answers of at most `count` tokens to each turn, opened as users open it. A turn continues what was
        said before, and the runtime keeps its state in between as it does in a chat."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Ids of text as a prompt: special tokens in it are recognized, and BOS is added where the model wants one."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, one or more, without special tokens."""
        ...

    def render(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]], prompt: bool
    ) -> str:
        """A conversation by the artifact's chat template in the renderer that users get; `prompt`: an answer follows.

        `messages` and `tools` are as transformers' apply_chat_template takes them. Raises if the renderer does.
        """
        ...

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        """Greedy continuation of a prompt that already went through the chat template (BOS not added twice)."""
        ...


class Exporter(Protocol):
    """One container. Each exporters/<target>/exporter.py has an object EXPORTER that implements it."""

    target: Target
    options: type[TargetOptions]
    requires: tuple[str, ...]  # import names needed to export; missing ones are an error that names the extra
    runtime_requires: tuple[str, ...]  # import names needed to open the artifact
    extra: str  # the pip extra that brings both
    card: Card  # what a model card says of the container

    def check(self, model: Model, options: TargetOptions) -> None:
        """UsageError or ModelError if the container cannot hold this model with these schemes."""
        ...

    def layout(self, model: Model, options: TargetOptions) -> Layout:
        """Every byte's place; reads no weights."""
        ...

    def semantics(self, model: Model, options: TargetOptions) -> Semantics:
        """How this artifact treats LongRoPE, windows and the context limit, and what else is known to differ."""
        ...

    def differences(self, model: Model, options: TargetOptions) -> tuple[Difference, ...]:
        """What this container cannot hold of this model's tokenizer and chat template, as kinds of text."""
        ...

    def read_back(self, folder: Path, model: Model) -> Iterator[tuple[str, F32]]:
        """(weight name, f32[out, in]) of every matrix, dequantized by the ecosystem's own reader, in any order.

        Yields a tied matrix once; leaves norms out.
        """
        ...

    def open(self, folder: Path, options: TargetOptions) -> Runtime:
        """Open the artifact in its real runtime with the runtime's own approximations off, as far as options allow."""
        ...

    def tensors(self, folder: Path) -> Iterator[TensorRow]:
        """A row a tensor of an artifact folder; reads no weights."""
        ...

    def devices(self) -> list[str]:
        """What the runtime finds to compute on here. Imports it: call this in a process of its own."""
        ...
