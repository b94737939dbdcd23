"""Follows a command from its start to its end, however it ends, for those who watch: events and metrics."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

from converters.errors import TundishError
from tundish.events import Events, written
from tundish.gates import FailedGatesError
from tundish.manifest_file import read_manifest
from tundish.metrics import Run, require_writable, write_metrics
from tundish.recipe import load_recipe, recipe_name


@dataclass(slots=True)
class Observed:
    """A command under way. It sets `manifest`, of what it built or verified, and the `runs` it consisted of."""

    events: Events
    manifest: dict[str, Any] | None = None
    runs: list[Run] = field(default_factory=list)


Titles = tuple[str, str]  # of recipe and model, for labels


@contextmanager
def observing(command: str, titles: Titles, events: str | None, metrics: Path | None) -> Iterator[Observed]:
    """Tell events of the command in the body, its beginning and its end, and write metrics, however it ends."""
    if metrics is not None:
        require_writable(metrics)
    with written(events) as lines:
        recipe, model = titles
        lines.emit("started", command=command, recipe=recipe, model=model)
        begun = time.monotonic()
        observed = Observed(lines)
        status, told = 0, ""
        try:
            yield observed
        except BaseException as error:
            if isinstance(error, FailedGatesError):
                observed.manifest = error.manifest
            status = status_of(error)
            told = f"interrupted by {Signals(status - 128).name}" if status > 128 else str(error)
            raise
        finally:
            seconds = time.monotonic() - begun
            if observed.manifest is not None:
                lines.gates(observed.manifest)
            own = Run(command, recipe, model, time.time(), seconds, status, observed.manifest)
            runs = [*observed.runs, own]
            unwritten = None if metrics is None else _write(metrics, runs)
            if unwritten is not None and status == 0:
                status, told = status_of(unwritten), str(unwritten)
            if status == 0:
                lines.emit("finished", status=0, seconds=round(seconds, 3))
            else:
                lines.emit("failed", status=status, seconds=round(seconds, 3), message=told)
        if unwritten is not None:
            raise unwritten


def status_of(error: BaseException) -> int:
    """The exit status that an exception of a command comes to."""
    if isinstance(error, TundishError):
        return error.exit_status
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 1


def _write(metrics: Path, runs: list[Run]) -> TundishError | None:
    """Why they could not be written: told at once, since the command may have failed over something else."""
    try:
        write_metrics(metrics, runs)
    except TundishError as error:
        print(f"warning: no metrics: {error}", file=sys.stderr)
        return error
    return None


def build_titles(recipe: str, model: str | None) -> Titles:
    """What a build's recipe and model are called, also where they cannot be read."""
    name = recipe_name(recipe)
    if model is None:
        try:
            model = load_recipe(recipe).model.source
        except TundishError:
            return name, ""
    return name, model_title(model)


def artifact_titles(folder: Path) -> Titles:
    """The same of a build's folder, also where that is none."""
    try:
        manifest = read_manifest(folder)
    except TundishError:
        return folder.name, ""
    return str(manifest["recipe"].get("name", "")), manifest["source"]["name"]


def model_title(model: str) -> str:
    """The last part of a folder or a Hub id, also of a path that leads nowhere."""
    try:
        return Path(model).expanduser().resolve().name if model else ""
    except (OSError, RuntimeError, ValueError):  # as find_source tells, when the build comes to it
        return Path(model).name
