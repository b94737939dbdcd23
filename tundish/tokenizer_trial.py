"""Tries a checkpoint's tokenizer in a process that has limits, before this one, or a runtime, takes it.

Tokenizer files are strangers' programs: their regexes may never end, and the libraries that run them may panic.

python -m tundish.tokenizer_trial FOLDER TOKENIZER_JSON BYTES
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from converters.errors import ModelError
from converters.tokenizer import Tokenizer
from converters.tokenizer_json import ensure_tokenizer_json
from tundish.chat_renderer import limit_memory
from tundish.child import exit_with_parent, run_child
from tundish.corpus import TOKEN_CORPUS
from tundish.scratch import temporary_folder

SECONDS = 60.0  # sound tokenizers take three at most, most of it for importing transformers
MEMORY = 1 << 32  # bytes, on top of what the process has when it begins
_RUN = 2000  # characters of one kind in a row, over which a regex that backtracks does not get in the time
_MORE_TOKENS = 64  # in a text's ids than it has bytes: special ones around it
_WORDS = 600  # characters of what the libraries say

_passed: set[str] = set()  # digests of what this process has tried


def try_tokenizer(folder: Path, tokenizer: Tokenizer, seconds: float = SECONDS, memory: int = MEMORY) -> None:
    """Load the tokenizer of the checkpoint in `folder` and encode a few texts, by the tokenizers library and, where it
    is installed, by transformers. ModelError if that fails, or takes more than `seconds` or `memory` bytes."""
    text = ensure_tokenizer_json(tokenizer)
    digest = sha256(text.encode())
    for path in (folder / "config.json", *(path for _, path in sorted(tokenizer.files.items()))):
        digest.update(sha256(path.read_bytes() if path.is_file() else b"").digest())
    key = digest.hexdigest()
    if key in _passed:
        return
    with temporary_folder() as scratch:
        ours = scratch / "tokenizer.json"
        ours.write_text(text, encoding="utf-8")
        arguments = [str(folder), str(ours), str(memory)]
        failure = run_child("tundish.tokenizer_trial", arguments, scratch / "trial.log", seconds, threads=1).failure
    if failure is not None:
        raise ModelError(
            "the tokenizer cannot be used",
            where=str(folder),
            expected=f"a few texts encoded within {seconds:g} s and {memory >> 20} MiB",
            found=failure[:_WORDS],
            mend="The tokenizer's files come with the model: fetch them again, or see whether a newer revision has "
            "others.",
        )
    _passed.add(key)


def _texts() -> Iterator[str]:
    yield from TOKEN_CORPUS
    for letter in ("a", " ", "\n", "1", "!", "é", "字"):
        yield letter * _RUN + "a"
        yield letter * _RUN + "!"


def _try(encode: Callable[[str], list[int]], name: str) -> None:
    for text in _texts():
        found = len(encode(text))
        if found > len(text.encode()) + _MORE_TOKENS:
            raise ValueError(f"{name} makes {found:,} tokens of a text of {len(text):,} characters")


def main(folder: str, ours: str, memory: str) -> None:
    """Exit with a sentence if the tokenizer fails."""
    limit_memory(int(memory))
    os.environ["RUST_BACKTRACE"] = "0"  # the sentence is what people need of a panic
    try:
        fast = FastTokenizer.from_file(ours)
        fast.no_padding()
        fast.no_truncation()
        _try(lambda text: fast.encode(text).ids, "the tokenizers library")
        if importlib.util.find_spec("transformers") is not None:
            from transformers import AutoTokenizer

            reference = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            _try(lambda text: reference(text)["input_ids"], "transformers")
    except BaseException as error:  # a panic of Rust code is no Exception
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    exit_with_parent()
    main(*sys.argv[1:])
