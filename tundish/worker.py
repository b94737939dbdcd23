"""The child process of verification: opens one artifact in its runtime and writes down what it does.

    python -m tundish.worker REQUEST.json

Everything goes into the request's folder: events.jsonl, a line as each step ends, and logits as .npy files. The parent
reads what is there even if this process crashed or was killed midway.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from converters.passes.assign import with_schemes
from converters.quantize.scheme import scheme_named
from converters.source import Source
from exporters.base import Target
from exporters.registry import EXPORTERS
from tundish.chat_gate import rendered
from tundish.chat_renderer import chat_renderer
from tundish.child import exit_with_parent
from tundish.digest import digest_of
from tundish.letters import use_plain_letters
from tundish.model import open_model
from tundish.recipe import Recipe
from tundish.state_gate import exercise


@dataclass(frozen=True, slots=True)
class Request:
    """What the child is asked. Paths are strings since it travels as JSON.

    `sequences` and `long_sequences` name .npy files of i64[n, length]; of long ones only the last `tail` positions'
    logits are written. `boundary` is the length on both sides of which state is tried too. `conversations` are indices
    of tundish.conversations.CONVERSATIONS.
    """

    target: str
    artifact: str
    source: str
    recipe: dict[str, Any]
    schemes: dict[str, str]  # of the weights, by name: a budget may have chosen them
    folder: str
    texts: list[str]
    token_ids: list[list[int]]  # to decode
    conversations: list[int]
    sequences: str
    long_sequences: str | None
    tail: int
    boundary: int | None
    question: str
    max_tokens: int


def run(request: Request) -> None:
    """Do every step in order; an exception ends the process and its message is the parent's to read."""
    folder, artifact = Path(request.folder), Path(request.artifact)
    exporter = EXPORTERS[Target(request.target)]
    recipe = Recipe.model_validate(request.recipe)
    options = recipe.targets[exporter.target]

    def emit(step: str, **result: object) -> None:
        with (folder / "events.jsonl").open("a", encoding="utf-8") as events:
            events.write(json.dumps({"step": step, **result}) + "\n")

    model = open_model(Source(request.source, Path(request.source), None, None), recipe)
    schemes = {name: scheme_named(scheme) for name, scheme in request.schemes.items()}
    model = replace(model, graph=with_schemes(model.graph, schemes))
    digests = {name: digest_of(values) for name, values in exporter.read_back(artifact, model)}
    emit("codes", digests=digests)
    runtime = exporter.open(artifact, options)
    emit("open", versions=package_versions(exporter.runtime_requires), note=runtime.note)
    emit(
        "tokens",
        ids=[runtime.tokenize(text) for text in request.texts],
        decoded=[runtime.decode(ids) if ids else "" for ids in request.token_ids],
    )
    emit("chat", prompts=list(rendered(runtime, request.conversations)))
    for index, ids in enumerate(np.load(request.sequences)):
        np.save(folder / f"logits-{index}.npy", runtime.logits(ids.tolist()).astype(np.float32, copy=False))
    emit("logits")
    sequences = np.load(request.sequences).tolist()
    emit("state", **exercise(runtime, sequences, model.context_length, request.boundary, folder))
    if model.tokenizer.chat_template is not None:
        # Here and not in the parent: a template is a program from the checkpoint, and this process has a time limit.
        with chat_renderer(model.tokenizer) as render:
            prompt = render([{"role": "user", "content": request.question}], True)
        emit("answer", **asdict(runtime.answer(prompt, request.max_tokens)))
    if request.long_sequences is not None:
        for index, ids in enumerate(np.load(request.long_sequences)):
            logits = runtime.logits(ids.tolist())[-request.tail :]
            np.save(folder / f"long-{index}.npy", logits.astype(np.float32, copy=False))
        emit("long")


def package_versions(modules: tuple[str, ...]) -> dict[str, str]:
    """Versions of the distributions that provide the modules."""
    providers = importlib.metadata.packages_distributions()
    names = sorted({name for module in modules for name in providers.get(module.split(".")[0], [])})
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    exit_with_parent()
    use_plain_letters()
    run(Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
