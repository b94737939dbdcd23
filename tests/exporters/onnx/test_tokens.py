"""The tokenizer files in onnxruntime-genai: ids and texts are transformers', or of a kind that is declared."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
og = pytest.importorskip("onnxruntime_genai")
transformers = pytest.importorskip("transformers")
pytest.importorskip("mistral_common")

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from converters.config import ModelConfig  # noqa: E402
from converters.tokenizer import Tokenizer as Record  # noqa: E402
from converters.tokenizer import read_tokenizer  # noqa: E402
from exporters.base import Difference, Model  # noqa: E402
from exporters.onnx.differences import tokenizer_differences  # noqa: E402
from exporters.onnx.tokenizer_files import LONGEST_MIXED_RUN, LONGEST_WORD, SPACE, tokenizer_files  # noqa: E402
from tests.converters.tiny_tokenizers import (  # noqa: E402
    ADDED,
    LLAMA3,
    O200K,
    config,
    write_byte_level,
    write_json,
    write_sentencepiece,
)
from tests.exporters.onnx.models import SMALL, write_artifact  # noqa: E402
from tests.exporters.tiny_graphs import random_graph  # noqa: E402

SMALL_STACK = 1 << 19  # of a thread on iOS and macOS
UNDERLINES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, UNDERLINES]}}
NEVER = {"normalizer": UNDERLINES}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FLAGGED = (
    AddedToken("<both>", lstrip=True, rstrip=True, normalized=False, special=True),
    AddedToken("<word>", single_word=True, normalized=False, special=True),
    AddedToken("<tool>", normalized=True, special=False),
)


def metaspace(scheme: str) -> dict[str, Any]:
    step = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    return {"normalizer": None, "pre_tokenizer": step}


def sentencepiece(
    folder: Path, steps: dict[str, Any], phi3: bool = False, more: Sequence[AddedToken] = ()
) -> ModelConfig:
    """tokenizer.json as transformers saves it, with other steps, for a class that takes the file as it is."""
    made = write_sentencepiece(folder, phi3)
    backend = transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer
    backend.add_tokens(list(more))
    document = json.loads(backend.to_str()) | {"pre_tokenizer": None} | steps
    if steps is NEVER:
        document["decoder"]["decoders"].pop()
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(document))
    stop = "<|endoftext|>" if phi3 else "</s>"
    names = {"bos_token": "<s>", "eos_token": stop, "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    return made


def every_pair(folder: Path, pattern: str | None) -> ModelConfig:
    """Byte-level BPE that merges whatever two characters of ASCII its pre-tokenizer leaves together."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*"abx1.!/", "\u0120", "\u010a", "\u010d", "\u0109", "\u00c2", "\u0127", "\u0125", "\u00e3", "\u0122"]
    merges = list(product(letters, letters))
    vocab = {text: index for index, text in enumerate([*alphabet, *(left + right for left, right in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    splits = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    size = tokenizer.get_vocab_size()
    return config(size, (size - 1,))


KINDS: dict[str, Callable[[Path], ModelConfig]] = {
    "phi3": lambda folder: replace(sentencepiece(folder, PREPEND, True, FLAGGED), vocab_size=32070),
    "metaspace": lambda folder: sentencepiece(folder, metaspace("always")),
    "first": lambda folder: sentencepiece(folder, metaspace("first")),
    "never": lambda folder: sentencepiece(folder, NEVER),
    "smollm": lambda folder: write_byte_level(folder, None, digits=True),
    "pairs_gpt2": lambda folder: every_pair(folder, None),
    "pairs_llama3": lambda folder: every_pair(folder, LLAMA3),
    "pairs_o200k": lambda folder: every_pair(folder, O200K),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A tokenizer in the runtime and in transformers."""

    record: Record
    folder: Path
    runtime: Any
    reference: Any
    declared: tuple[Difference, ...]

    def expected(self, text: str) -> list[int]:
        ids: list[int] = self.reference(text, add_special_tokens=False)["input_ids"]
        return ids

    def found(self, text: str) -> list[int]:
        return [int(index) for index in self.runtime.encode(text)]

    def names(self, text: str, of: str) -> set[str]:
        return {kind.name for kind in self.declared if kind.of == of and kind.applies(text)}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kind]:
    """One tiny model serves all: a tokenizer reads nothing of it."""
    root = tmp_path_factory.mktemp("kinds")
    opened: dict[str, Kind] = {}

    def kind(name: str) -> Kind:
        if name not in opened:
            source = root / name / "checkpoint"
            record = read_tokenizer(source, KINDS[name](source))
            files = tokenizer_files(record)
            model = root / "onnx"
            if not model.exists():
                shape = replace(SMALL, vocab_size=64, hidden_size=64, num_layers=1)
                write_artifact(Model(random_graph(shape), record, shape.context_length, "Tiny"), root)
            folder = root / name / "artifact"
            folder.mkdir()
            for file in model.iterdir():
                if file.suffix != ".jinja" and not file.name.startswith("tokenizer"):
                    (folder / file.name).symlink_to(file)
            for path, data in files.items():
                (folder / path).write_bytes(data)
            reference = transformers.AutoTokenizer.from_pretrained(source)
            runtime = og.Tokenizer(og.Model(str(folder)))
            opened[name] = Kind(record, folder, runtime, reference, tokenizer_differences(record))
        return opened[name]

    return kind


PARTS = (
    "south,", "The", "don't", "naïve", "Привет", "שלום", "हिन्दी", "漢字", "한국어", "🙂", "e\u0301", "12345",
    "if (x) {", "}", ");", "...", "//", "<0x0A>", "▁", "\ufeff", "\u200b", "x" * 30, "\U000e0041", "a", "1",
)  # fmt: skip
WHITE = (
    " ", " ", "  ", "   ", "\t", "\n", "\r\n", "\r\n\r\n", "\r", " \n", "\n    ", " \n  ", "\n \n   ", " \r\n  ",
    "\u0085", "\u00a0", "\u180e", "\u2003", "\u2028", "\u3000", "\n\u3000\u3000", "\u3000\n", "\x0b", "\x1c",
    " " * 40, "", "\0",
)  # fmt: skip


def generated(record: Record, count: int) -> list[str]:
    dice = random.Random(12)
    added = [token.text for token in record.tokens if token.type in ADDED]
    texts = []
    for index in range(count):
        parts = [dice.choice(WHITE)] if index % 3 == 0 else []
        for _ in range(1 + index % 8):
            parts += [dice.choice(PARTS), dice.choice(WHITE)]
            if dice.random() < 0.15:
                parts += [dice.choice(added), dice.choice(WHITE)]
        texts.append("".join(parts))
    return texts


@pytest.mark.parametrize("name", ["phi3", "metaspace", "never"])
@pytest.mark.parametrize("end", ["\r\n", "\r\n\r\n", "\r", "\n"])
def test_line_ends_stay_in_their_pieces(name: str, end: str, kinds: Callable[[str], Kind]) -> None:
    kind = kinds(name)
    sentences = (
        "The river runs south,",
        'He said "yes".',
        "call(a, b);",
        "if (x) {",
        "Dear Sir:",
        "<p>text</p>",
        "12,",
    )
    for first, second in product(sentences, sentences):
        text = f"{first}{end}{second}{end}and more words, so that the paragraph is long enough,{end}  - item"
        assert kind.found(text) == kind.expected(text), text
        assert not kind.names(text, "encoding"), text


@pytest.mark.parametrize("name", ["pairs_llama3", "pairs_o200k", "pairs_gpt2"])
def test_white_space_at_line_ends_is_cut_as_the_regex_says(name: str, kinds: Callable[[str], Kind]) -> None:
    kind = kinds(name)
    parts = (" ", "\n", "\r\n", "\t", "\u3000", "a", ".", "1")
    for chosen in product(parts, repeat=4):
        text = "x" + "".join(chosen)
        assert kind.found(text) == kind.expected(text), text


@pytest.mark.parametrize("name", KINDS)
def test_what_differs_is_declared(name: str, kinds: Callable[[str], Kind]) -> None:
    kind = kinds(name)
    bos = [kind.record.bos_id] if kind.record.add_bos else []
    for text in generated(kind.record, 300):
        ids = kind.expected(text)
        if kind.found(text) != ids:
            assert kind.names(text, "encoding"), text
        if not (bos or ids):
            continue
        if kind.runtime.decode([*bos, *ids]) != kind.reference.decode([*bos, *ids], skip_special_tokens=True):
            assert kind.names(text, "decoding"), text


@pytest.mark.parametrize("name", ["phi3", "never", "pairs_llama3", "pairs_gpt2"])
def test_transformers_reads_the_files_as_the_checkpoint(name: str, kinds: Callable[[str], Kind]) -> None:
    kind = kinds(name)
    again = transformers.AutoTokenizer.from_pretrained(kind.folder)
    for text in generated(kind.record, 100):
        assert again(text, add_special_tokens=False)["input_ids"] == kind.expected(text), text


@pytest.mark.parametrize(
    ("name", "declared", "differs", "equal"),
    [
        ("never", "nul", "a\0b", "a\\0b"),
        ("phi3", "white space after a token", "<|end|>\u00a0a", "<|end|> \n a"),
        ("phi3", "white space before a token", "a <both>", "a<both>"),
        ("phi3", "token inside a word", "a<word>", "a, <word> b"),
        ("phi3", "token in normalized text", "a <tool> b", "a <tools> b"),
        ("metaspace", "two first spaces", "</s> a", "</s>a b"),
        ("first", "no first space", "Hello", "<s>Hello"),
        ("phi3", "cut inside a piece", " In the long river south,\r\nthe", "In the long river south,\r\nthe"),
        ("never", "cut inside a piece", "abc" * LONGEST_WORD, "abc" * (LONGEST_WORD // 3)),
        ("never", "byte tokens as text", "<0x0A> a", "a<0x0A>"),
        ("pairs_gpt2", "next line", ".\u0085", ".\u2028"),
        ("pairs_o200k", "slash after a line end", "..\n/", "a\n/"),
        ("pairs_llama3", "long white space", "\u3000\u3000" + " " * (LONGEST_MIXED_RUN + 2) + "\n", "\u3000\u3000  \n"),
        ("pairs_llama3", "long white space", " " * (LONGEST_WORD + 4) + "\n", " " * (LONGEST_WORD - 1) + "\n"),
    ],
)
def test_each_kind_says_which_texts_it_has(
    name: str, declared: str, differs: str, equal: str, kinds: Callable[[str], Kind]
) -> None:
    kind = kinds(name)
    assert kind.found(differs) != kind.expected(differs)
    assert declared in kind.names(differs, "encoding")
    assert kind.found(equal) == kind.expected(equal)
    assert not kind.names(equal, "encoding")


@pytest.mark.parametrize(
    ("name", "declared", "differs", "equal"),
    [
        ("never", "nul in an answer", "a\0b", "ab"),
        ("never", "noncharacter in an answer", "a\ufffeb", "a\ufffdb"),
        ("never", "nothing to print", "</s>", "a</s>"),
        ("phi3", "space in front", "Hello", "<|user|>Hello"),
        ("phi3", "space in front", "<|user|>Hello<|end|>you", "<|user|>Hello<|end|>"),
        ("first", "space in front", "Hello", "<s>Hello"),
    ],
)
def test_each_kind_says_which_answers_it_has(
    name: str, declared: str, differs: str, equal: str, kinds: Callable[[str], Kind]
) -> None:
    kind = kinds(name)
    for text, same in ((differs, False), (equal, True)):
        ids = kind.expected(text)
        assert (kind.runtime.decode(ids) == kind.reference.decode(ids, skip_special_tokens=True)) is same, text
        assert (declared in kind.names(text, "decoding")) is not same, text


@pytest.mark.parametrize("name", ["never", "pairs_llama3"])
@pytest.mark.parametrize("text", ["x", " ", "漢", "\u3000", "\n", " \n"])
def test_endless_words_and_runs_need_little_stack(name: str, text: str, kinds: Callable[[str], Kind]) -> None:
    """std::regex takes stack for each character that it matches: without a bound, this many end the process."""
    kind = kinds(name)
    long = text * 5000
    decoded = []
    before = threading.stack_size(SMALL_STACK)
    try:
        thread = threading.Thread(target=lambda: decoded.append(kind.runtime.decode(kind.found(long))))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert decoded == [long]
