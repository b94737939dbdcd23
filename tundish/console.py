"""What commands tell people while they work, and how they print what they came to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tundish import tables
from tundish.disk import disk_errors
from tundish.escapes import json_line, terminal

if TYPE_CHECKING:
    from tundish.events import Events
    from tundish.watcher import Watcher

state = ""  # what is said if the command is interrupted


def if_interrupted(said: str) -> None:
    """From now on, say this if the command is interrupted."""
    global state
    state = said


@contextmanager
def figures_of_failed_gates(as_json: bool) -> Iterator[None]:
    """A build that misses a gate prints its figures like one that passes, before the error."""
    from tundish.gates import FailedGatesError

    try:
        yield
    except FailedGatesError as error:
        show(error.manifest, as_json, tables.summary_text)
        raise


@contextmanager
def watcher(events: Events) -> Iterator[Watcher]:
    """Progress as events, and for people."""
    from tundish.events import watching

    with people(events) as told:
        yield watching(events, told)


@contextmanager
def people(events: Events | None = None) -> Iterator[Watcher]:
    """Progress on stderr: a bar on a terminal, plain lines elsewhere; nothing if events go there."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from tundish.watcher import Watcher

    def published(out: Path) -> None:
        if_interrupted("the build had been published by then")

    if events is not None and events.alone:
        yield Watcher(lambda text: None, lambda text, total: None, lambda amount: None, published)
        return
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:

        def say(text: str) -> None:
            print(terminal(text), file=sys.stderr, flush=True)

        yield Watcher(say, lambda text, total: say(text), lambda amount: None, published)
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:

        def start(text: str, total: int) -> None:
            progress.add_task(terminal(text), total=total)

        yield Watcher(
            lambda text: progress.console.print(terminal(text), markup=False),
            start,
            lambda amount: progress.advance(progress.task_ids[-1], amount),
            published,
        )


def show(document: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    """Print a result: as JSON, or as text(document). A reader that went away (a closed pipe) is typer's to handle."""
    said = json_line(document, indent=2) if as_json else terminal(text(document))
    with disk_errors(Path("standard output"), "Free space where it goes, or send it elsewhere."):
        print(said, flush=True)
