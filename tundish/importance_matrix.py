"""`tundish imatrix`: what a recipe's calibration measures, as a file that llama-quantize takes.

It is measured as llama-imatrix does it: the float model reads, and the mean squares of every matrix's input columns are
kept. A recipe's schemes, method and budget do not matter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from converters.errors import UsageError
from converters.file_digest import sha256_of
from converters.graph import Node
from converters.quantize.block import blaming_weights
from converters.quantize.imatrix import read_imatrix, write_imatrix
from converters.quantize.importance import random_token_squares
from converters.quantize.sequential import quantize_sequentially
from converters.source import blaming_changes, require_unchanged, source_stamp
from exporters.base import Model
from exporters.gguf.importance import imatrix_means, imatrix_names
from tundish.cache import in_use
from tundish.calibrate import calibration_ids, linear_elements, origin_of, reading_asked, title_of
from tundish.calibration_text import digest
from tundish.disk import disk_errors, put_in_place
from tundish.job import Choices, settle_recipe, settle_source, telling_lines
from tundish.model import open_model
from tundish.publish import reclaim, staging
from tundish.recipe import CalibrationSource, Recipe
from tundish.recipe_errors import MisfitError
from tundish.user_path import expanded
from tundish.watcher import Watcher

Form = Literal["gguf", "dat"]  # the generations of the file
Squares = Mapping[str, NDArray[np.float64]]


@telling_lines
def make_imatrix(choices: Choices, file: Path, form: Form | None, watcher: Watcher) -> dict[str, Any]:
    """Write what the recipe's calibration measures to `file`, and return what --json prints.

    `form` None: .dat if the file's name ends so, else GGUF. `file` appears when it is whole. UsageError if the recipe
    has nothing read, or if there is something that is no importance matrix of this model.
    """
    recipe = settle_recipe(choices)
    _require_measuring(recipe)
    path = expanded(file).absolute()
    _require_file(path)
    source = settle_source(choices, recipe)
    watcher.say(f"model: {source.name} ({source.folder})")
    stamp = source_stamp(source.folder)
    form = form or ("dat" if path.suffix == ".dat" else "gguf")
    with blaming_changes(source.folder, stamp), in_use(source.folder):
        model = open_model(source, recipe)
        _require_replaceable(path, model)
        read = reading_asked(model, recipe)
        reclaim(path, watcher.say)
        with staging(path) as folder:  # made first: a disk that refuses it shall not do so after minutes
            with blaming_weights(model.graph):
                squares, name, record = _measure(model, recipe, watcher)
            require_unchanged(source.folder, stamp)
            means = imatrix_means(squares, model.graph)
            legacy = form == "dat"
            with disk_errors(path):
                made = folder / path.name
                write_imatrix(
                    made, means, chunks=read.sequences, chunk_size=read.length, datasets=[name], legacy=legacy
                )
                nbytes, sha256 = made.stat().st_size, sha256_of([made])[made]
                _require_file(path)  # somebody may have put something there meanwhile
                _require_replaceable(path, model)
                put_in_place(made, path)
    watcher.say(f"written: {path}")
    return {
        "file": str(path),
        "format": form,
        "bytes": nbytes,
        "sha256": sha256,
        "entries": len(means),
        "chunks": read.sequences,
        "chunk_size": read.length,
        "calibration": record,
    }


def _require_measuring(recipe: Recipe) -> None:
    source = recipe.calibration.source
    if source in (CalibrationSource.NONE, CalibrationSource.IMATRIX):
        raise MisfitError(
            "the recipe's calibration measures nothing",
            ("calibration", "source"),
            expected="calibration.source text, dataset, self or random-tokens",
            found=source.value,
            mend="Extend the recipe, with calibration: {source: text}.",
        )


def _require_file(path: Path) -> None:
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise UsageError("--out is not a file", where=str(path), mend="Choose another name.")


def _require_replaceable(path: Path, model: Model) -> None:
    """UsageError unless `path` is absent or an importance matrix as this would write: with entries of all matrices."""
    if not path.exists():
        return
    try:
        found = {name: means.shape for name, means in read_imatrix(path).means.items()}
    except UsageError as error:
        raise _other(path, error.found or error.what) from error
    widths = {weight.name: (weight.shape[-1],) for weight in model.graph.weights.values()}
    if found != {names[0]: widths[weight] for weight, names in imatrix_names(model.graph).items()}:
        raise _other(path, "one of another model, or one without the head's entry")


def _other(path: Path, found: str) -> UsageError:
    expected = "nothing, or an importance matrix that tundish wrote for this model"
    return UsageError(
        "--out holds another file", where=str(path), expected=expected, found=found, mend="Choose another name."
    )


def _measure(model: Model, recipe: Recipe, watcher: Watcher) -> tuple[Squares, str, dict[str, Any]]:
    """Mean squares f64[in] by weight name, what the text is called, and what is told of it."""
    calibration, read = recipe.calibration, reading_asked(model, recipe)
    record: dict[str, Any] = {"source": calibration.source.value, "seed": calibration.seed}
    if calibration.source is CalibrationSource.RANDOM_TOKENS:
        watcher.say(f"the model reads {read.tokens} random tokens")
        squares = random_token_squares(model.graph, read.tokens, calibration.seed)
        name = f"{read.tokens} random tokens, seed {calibration.seed}"
        return squares, name, record | {"tokens": read.tokens}
    origin = origin_of(calibration)
    if calibration.source is CalibrationSource.SELF:
        watcher.say(f"the model writes {read.tokens} tokens, one after the other")
        watcher.start("writing text", read.tokens)
    token_ids = calibration_ids(model, calibration, origin, read.sequences, read.length, watcher.advance)
    watcher.say(f"the model reads {read.sequences} sequences of {read.length} tokens of {title_of(origin)}")
    watcher.start("measuring", linear_elements(model.graph))
    found: dict[str, NDArray[np.float64]] = {}

    def observe(node: Node, square: NDArray[np.float64]) -> None:
        found.update(dict.fromkeys(node.op.weights, square))

    quantize_sequentially(model.graph, token_ids, advance=watcher.advance, observe=observe)
    return found, title_of(origin), record | {"text": title_of(origin), "token_ids_sha256": digest(token_ids)}
