"""The child process of a comparison: opens one artifact in its runtime, and writes down its logits and its speed.

    python -m tundish.measure REQUEST.json

Into the request's folder go logits-<index>.npy, a file a sequence, and at the end result.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from exporters.base import Runtime, Target
from exporters.registry import EXPORTERS
from tundish.child import exit_with_parent
from tundish.recipe import Recipe
from tundish.worker import package_versions

_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Request:
    """What the child is asked. Paths are strings since it travels as JSON; `sequences` names a file of i64[n, length].

    `prompt` is continued by `tokens` tokens, timed.
    """

    target: str
    artifact: str
    recipe: dict[str, Any]
    folder: str
    sequences: str
    prompt: str
    tokens: int


def run(request: Request) -> None:
    """Measure; an exception ends the process and its message is the parent's to read."""
    folder, exporter = Path(request.folder), EXPORTERS[Target(request.target)]
    options = Recipe.model_validate(request.recipe).targets[exporter.target]
    runtime = exporter.open(Path(request.artifact), options)
    for index, ids in enumerate(np.load(request.sequences)):
        np.save(folder / f"logits-{index}.npy", runtime.logits(ids.tolist()).astype(np.float32, copy=False))
    result = {
        "versions": package_versions(exporter.runtime_requires),
        "tokens_per_second": tokens_per_second(runtime, request.prompt, request.tokens),
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def tokens_per_second(runtime: Runtime, prompt: str, tokens: int) -> float | None:
    """Greedy tokens a second after the prompt: an answer of `tokens` less one that ends at its first, best of three.

    None if the answer ends at once, or so fast that the difference is noise.
    """

    def spent(wanted: int) -> tuple[float, int]:
        start = perf_counter()
        answer = runtime.answer(prompt, wanted)
        return perf_counter() - start, len(answer.token_ids)

    spent(1)  # opens what the runtime generates with
    first = min(spent(1)[0] for _ in range(_REPEATS))
    whole, count = min(spent(tokens) for _ in range(_REPEATS))  # greedy answers are equally long
    return (count - 1) / (whole - first) if count > 1 and whole > first else None


if __name__ == "__main__":
    exit_with_parent()
    run(Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
