"""What the model reads for calibration: Python's documentation, the user's text, a dataset's, or what it writes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.dataset import Dataset
from converters.errors import ModelError, UsageError
from converters.generate import generate
from converters.tokenizer import Tokenizer
from converters.tokenizer_json import fast_tokenizer
from exporters.base import Model
from tundish.chat_renderer import chat_renderer
from tundish.documentation import NAME, documentation
from tundish.heldout import require_not_held_out
from tundish.recipe_errors import MisfitError
from tundish.text_files import Conversation, Text, read_texts, text_files

PIECE = 1 << 16  # characters that are tokenized at a time
MESSAGE = 1 << 10  # characters, about, of a message made of paragraphs
MOST = 1 << 23  # characters that are read, unless more are needed
MOST_PER_TOKEN = 32  # that is when so many for each token are more
LEAST_DISTINCT = 16  # token ids in a text that is worth calibrating with
MARK = "tundish0user0message"  # a message of which a template changes nothing


@dataclass(frozen=True, slots=True)
class Documentation:
    """Prose that Python itself carries: see tundish.documentation."""


@dataclass(frozen=True, slots=True)
class Files:
    """A file, or a folder of them: see tundish.text_files."""

    path: Path


@dataclass(frozen=True, slots=True)
class OwnText:
    """The model's own: see converters.generate."""


Origin = Documentation | Files | Dataset | OwnText
Ids = NDArray[np.int64]


def calibration_sequences(
    model: Model,
    origin: Origin,
    sequences: int,
    length: int,
    seed: int,
    chat: bool = False,
    advance: Callable[[int], None] = lambda tokens: None,
    say: Callable[[str], None] = lambda text: None,
) -> Ids:
    """Token ids i64[sequences, length] of the origin's text. Each begins with BOS where the model wants one.

    Plain text: windows that do not overlap, chosen at random by the seed. `chat`: conversations in random order, one
    after the other, the last of a sequence cut off; a text is made messages of the user's, paragraphs together up to a
    size, and the prompt for an answer follows. OwnText: see `own_text`. Of more than MOST characters the first ones
    count, which `say` is told.

    UsageError says what is wrong with a text, or how much it lacks, ModelError that chat is asked of a model without a
    template. `advance` counts tokens that are generated.
    """
    encoder = _Encoder(model.tokenizer)
    _require_enough(sequences, length, len(encoder.bos))
    if isinstance(origin, OwnText):
        ids = own_text(model, sequences, length, seed, chat, advance)
    else:
        most = max(MOST, MOST_PER_TOKEN * sequences * length)
        where = name_of(origin)
        texts = _up_to(most, _texts(origin), where, say)
        if chat:
            ids = _packed(encoder.encode(_prompts(model.tokenizer, texts)), encoder.bos, sequences, length, seed, where)
        else:
            plain = (text.text if isinstance(text, Conversation) else text for text in texts)
            stream = _joined(encoder.encode(chain.from_iterable(map(_pieces, plain))))
            ids = _windows(stream, encoder.bos, sequences, length, seed, where)
    distinct = len(np.unique(ids))
    if distinct < LEAST_DISTINCT:
        raise UsageError(
            "the calibration text says nothing",
            where=name_of(origin),
            expected="prose or code as the model will read it",
            found=f"{distinct} different tokens",
        )
    return ids


def _require_enough(sequences: int, length: int, bos: int) -> None:
    """MisfitError if sequences cannot have LEAST_DISTINCT tokens, whatever the text is."""
    if sequences * (length - bos) < LEAST_DISTINCT:
        raise MisfitError(
            "calibration.sequences and calibration.length read too few tokens to learn from",
            ("calibration", "length"),
            expected=f"at least {LEAST_DISTINCT} tokens" + (" besides those that begin each sequence" if bos else ""),
            found=f"{sequences} × {length}",
        )


def digest(ids: Ids) -> str:
    """SHA-256 of token ids as little-endian 64-bit integers, row by row: whether two calibrations read the same."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()


def own_text(model: Model, sequences: int, length: int, seed: int, chat: bool, advance: Callable[[int], None]) -> Ids:
    """i64[sequences, length] that the model writes: texts after BOS, or with `chat` both sides of conversations.

    The user's side begins where the template puts the user's words, the answer where it asks for one. ModelError if the
    template does not show the user's words as they are, once.
    """
    tokenizer, encoder = model.tokenizer, _Encoder(model.tokenizer)
    if not chat:
        openings = [[] if tokenizer.bos_id is None else [tokenizer.bos_id]]
    else:
        with chat_renderer(tokenizer) as render:
            parts = render([{"role": "user", "content": MARK}], True).split(MARK)
        if len(parts) != 2:
            raise ModelError(
                "the chat template does not say where the user's words begin and end",
                where="chat_template",
                expected="one message shown once, as it is",
                found=f"{len(parts) - 1} times",
                mend="Calibrate with text, or without chat.",
            )
        user, answer = (each.tolist() for each in encoder.encode(parts))
        openings = [[*([] if user[:1] == encoder.bos else encoder.bos), *user], answer]
    return generate(model.graph, sequences, length, seed, openings, tokenizer.eos_ids, advance=advance)


class _Encoder:
    """The model's tokenizer, which recognizes special tokens in texts, and the BOS that it wants in front of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._fast = fast_tokenizer(tokenizer)
        self._fast.no_truncation()
        self.bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []

    def encode(self, texts: Iterable[str]) -> list[Ids]:
        """i64[tokens] of each text, nothing added."""
        encoded = self._fast.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int64) for each in encoded]


def _texts(origin: Documentation | Files | Dataset) -> Iterator[Text]:
    match origin:
        case Documentation():
            yield from documentation()
        case Files(path):
            yield from chain.from_iterable(map(_checked_texts, text_files(path)))
        case Dataset():
            from converters.hub_dataset import fetch  # huggingface_hub is slow to import

            yield from chain.from_iterable(_checked_texts(fetch(origin, name)) for name in origin.files)


def _checked_texts(path: Path) -> Iterator[Text]:
    for text in read_texts(path):
        require_not_held_out(text.text if isinstance(text, Conversation) else text, str(path))
        yield text


def name_of(origin: Origin) -> str:
    """What people call it."""
    match origin:
        case Documentation():
            return NAME
        case Files(path):
            return str(path)
        case Dataset(repo_id, revision):
            return f"{repo_id} at {revision[:12]}"
        case OwnText():
            return "the model's own text"


def _up_to(most: int, texts: Iterable[Text], where: str, say: Callable[[str], None]) -> Iterator[Text]:
    """Texts until they hold that many characters; the one that passes it is cut off, or left out if it is a talk."""
    left = most
    for text in texts:
        size = len(text.text if isinstance(text, Conversation) else text)
        if size > left:
            say(f"calibration: of {where} the first {most:,} characters are read")
            if isinstance(text, str) and left:
                yield text[:left]
            return
        left -= size
        yield text


def _pieces(text: str) -> Iterator[str]:
    """A text and an empty line, in parts that a tokenizer takes at once."""
    for start in range(0, len(text), PIECE):
        yield text[start : start + PIECE] + ("\n\n" if start + PIECE >= len(text) else "")


def _prompts(tokenizer: Tokenizer, texts: Iterable[Text]) -> Iterator[str]:
    """Conversations as the template shows them."""
    with chat_renderer(tokenizer) as render:
        for text in texts:
            if isinstance(text, Conversation):
                yield render(text.messages, False)
            else:
                for words in _messages(text):
                    yield render([{"role": "user", "content": words}], True)


def _messages(text: str) -> Iterator[str]:
    """A text's paragraphs, cut off or put together until they are long enough for a message."""
    held: list[str] = []
    paragraphs = (each for each in text.split("\n\n") if each.strip())
    for part in (each[start : start + MESSAGE] for each in paragraphs for start in range(0, len(each), MESSAGE)):
        held.append(part)
        if sum(map(len, held)) >= MESSAGE:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def _joined(parts: list[Ids]) -> Ids:
    return np.concatenate([np.empty(0, np.int64), *parts])


def _windows(stream: Ids, bos: list[int], sequences: int, length: int, seed: int, where: str) -> Ids:
    """Windows of a stream i64[tokens], in its order."""
    taken = length - len(bos)
    available = len(stream) // taken if taken else 0
    if available < sequences:
        raise _too_short(sequences, length, where, f"{len(stream):,} tokens")
    chosen = np.sort(np.random.default_rng(seed).choice(available, sequences, replace=False))
    windows = stream[: available * taken].reshape(available, taken)[chosen]
    return np.concatenate([np.tile(np.array(bos, np.int64), (sequences, 1)), windows], axis=1)


def _packed(talks: list[Ids], bos: list[int], sequences: int, length: int, seed: int, where: str) -> Ids:
    """Each sequence begins with the beginning of a conversation, and no conversation is in two."""
    order = iter(np.random.default_rng(seed).permutation(len(talks)).tolist())
    rows: list[Ids] = []
    while len(rows) < sequences:
        parts: list[Ids] = []
        for index in order:
            starts_itself = parts or talks[index][:1].tolist() == bos
            parts += [talks[index]] if starts_itself else [np.array(bos, np.int64), talks[index]]
            if sum(map(len, parts)) >= length:
                break
        else:
            found = f"{sum(map(len, talks)):,} tokens in {len(talks):,} conversations"
            raise _too_short(sequences, length, where, found)
        rows.append(_joined(parts)[:length])
    return np.stack(rows)


def _too_short(sequences: int, length: int, where: str, found: str) -> UsageError:
    return UsageError(
        "the calibration text is too short",
        where=where,
        expected=f"{sequences} sequences of {length} tokens",
        found=found,
        mend="Give more text, or lower calibration.sequences or calibration.length.",
    )
