"""The Modelfile by which `ollama create` takes the GGUF file beside it.

Its grammar is that of https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx (parser/parser.go). It has no
TEMPLATE: Ollama looks at the chat template in the GGUF (server/model.go, template/template.go). One within 99 edits of
one that it knows is replaced by its own in Go's language; llama.cpp renders any other as it is, for which older
versions sent the bare prompt.
"""

from __future__ import annotations

from collections.abc import Iterator

from converters.tokenizer import Tokenizer
from exporters.base import Model

MODELFILE = "Modelfile"


def modelfile(model: Model, file: str) -> bytes:
    """For the file of that name in the same folder: its context and the texts that end an answer."""
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {model.context_length}"]
    lines += [f'PARAMETER stop "{text}"' for text in _stop_texts(model.tokenizer)]
    return "".join(line + "\n" for line in lines).encode()


def _stop_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """What can be spelled in a Modelfile; llama.cpp stops at the others too, whose ids are in the GGUF."""
    for text in dict.fromkeys(tokenizer.tokens[index].text for index in tokenizer.eos_ids):
        if text.strip() and text.isprintable() and '"' not in text:
            yield text
