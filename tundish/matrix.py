"""Many builds at once: every cell of a matrix, on this machine's cores and memory or on the workers of a Dask cluster.

    survey of each model  ──▶  builds of what is not there yet  ──▶  outcomes
    digests, memory, what is reused      as many as workers have memory for

Both are tasks of Dask (tundish.matrix_worker), which gives them to workers, and again to others if a worker is lost.
Cells that read the same calibration do not begin together: the first keeps it in the cache for the others.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import ResourceError, TundishError, UsageError
from tundish.events import Event, Events
from tundish.manifest_file import SIGNATURE
from tundish.matrix_cluster import MEMORY, connected, require_workers
from tundish.matrix_file import Cell, Matrix, MatrixModel
from tundish.metrics import Run
from tundish.observe import Observed
from tundish.papers import sign_folder
from tundish.processors import cores
from tundish.recipe import resolved_yaml
from tundish.signing import Signer

if TYPE_CHECKING:
    from distributed import Client, Future

    from tundish.matrix_worker import Answer

_RETRIES = 1  # of a task whose process was killed
_SURVEY_BYTES = 1 << 30  # that a survey takes, about: libraries, kernels, a tokenizer with its text, but no weights

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line settles. `out`: each cell's build goes to <out>/<cell's name>; `memory` in bytes, of this
    machine; `scheduler`: the address of Dask's, None: this machine alone; `threads` of each build; `signer` signs what
    was built, and what is reused without a signature, in this process: workers do not get the key."""

    out: Path
    scheduler: str | None = None
    memory: int | None = None
    threads: int | None = None
    fresh: bool = False
    signer: Signer | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a cell ended: `result` is `built`, `reused` or `failed`; `ended` in seconds since 1970."""

    cell: Cell
    out: Path
    result: str
    status: int
    message: str
    manifest: Json | None
    worker: str
    seconds: float
    ended: float = field(default_factory=time.time)

    def as_run(self) -> Run:
        """For metrics, where a cell is a build like any other."""
        cell = self.cell
        return Run("build", cell.recipe.name, cell.model.title, self.ended, self.seconds, self.status, self.manifest)

    def as_dict(self) -> Json:
        """As --json prints it."""
        targets = (self.manifest or {"targets": {}})["targets"]
        return {
            "model": self.cell.model.title,
            "recipe": self.cell.recipe.name,
            "result": self.result,
            "status": self.status,
            "seconds": self.seconds,
            "bytes": {target: entry["bytes"] for target, entry in targets.items()},
            "worker": self.worker,
            "out": str(self.out),
            "message": self.message,
        }


class MatrixError(TundishError):
    """Cells that failed; the exit status is the highest of theirs."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        failed = [outcome for outcome in outcomes if outcome.status]
        super().__init__(
            f"{len(failed)} of {len(outcomes)} builds failed", found=", ".join(each.cell.name for each in failed)
        )
        self.exit_status = max(outcome.status for outcome in failed)


def run_matrix(matrix: Matrix, options: Options, observed: Observed, say: Callable[[str], None]) -> list[Outcome]:
    """Build what is not there yet, and return how each cell ended, in their order; `observed` has each as it ends.

    UsageError if there is no Dask, no scheduler, or none of its workers can do it. A cell that fails is an outcome.
    """
    if options.scheduler is not None and options.memory is not None:
        mend = "Workers declare theirs when they are started."
        raise UsageError("--memory is of this machine, and --scheduler of others", mend=mend)
    with connected(options.scheduler, options.memory, len(matrix.cells)) as client:
        run = f"tundish-{secrets.token_hex(4)}"
        client.subscribe_topic(run, lambda event: _relay(event[1], observed.events, say))
        folders = {_source(cell.model) for cell in matrix.cells if _is_folder(cell.model)}
        memory = require_workers(client, options.scheduler, options.out, sorted(folders))
        return _Matrix(client, matrix, options, observed, say, run, memory).run()


def require_built(outcomes: list[Outcome]) -> None:
    """MatrixError if a cell failed."""
    if any(outcome.status for outcome in outcomes):
        raise MatrixError(outcomes)


def document_of(outcomes: list[Outcome], out: Path) -> Json:
    """What --json prints."""
    return {
        "out": str(out),
        "status": max(outcome.status for outcome in outcomes),
        "cells": [outcome.as_dict() for outcome in outcomes],
    }


def _relay(event: Event, events: Events, say: Callable[[str], None]) -> None:
    events.pass_on(event)
    text = {"message": event.get("message"), "phase": event.get("phase")}.get(event["event"])
    if event["event"] == "source":
        text = f"reading {event['folder']}, {event['bytes']:,} bytes, for its digests"
    if text is not None:
        name = "/".join(event[part] for part in ("model", "recipe") if part in event)
        say(f"[{name}] {text}")


def _is_folder(model: MatrixModel) -> bool:
    return Path(model.source).expanduser().is_dir()


def _source(model: MatrixModel) -> str:
    """As workers are to find it, which may be in another folder."""
    return str(Path(model.source).expanduser().resolve()) if _is_folder(model) else model.source


@dataclass(slots=True)
class _Matrix:
    """A run: what is under way, and how the cells ended that have."""

    client: Client
    matrix: Matrix
    options: Options
    observed: Observed
    say: Callable[[str], None]
    run_name: str
    memory: int  # of the largest worker
    outcomes: dict[str, Outcome] = field(default_factory=dict)  # by the cell's name
    needs: dict[str, Json] = field(default_factory=dict)
    digests: dict[MatrixModel, Json] = field(default_factory=dict)
    waiting: dict[str, list[Cell]] = field(default_factory=dict)  # cells by the calibration that another makes for them
    futures: dict[Future[Answer], Cell | MatrixModel] = field(default_factory=dict)

    def run(self) -> list[Outcome]:
        cells = self.matrix.cells
        try:
            self._survey()
            self._build([cell for cell in cells if cell.name in self.needs])
        finally:
            self.client.cancel(list(self.futures))
        return [self.outcomes[cell.name] for cell in cells]

    def _survey(self) -> None:
        """See what is there and what the others need, a task a model."""
        from distributed import as_completed

        models = dict.fromkeys(cell.model for cell in self.matrix.cells)
        memory, threads = min(_SURVEY_BYTES, self.memory), self.options.threads
        futures = [self._submit(model, "survey", self._cells_of(model), memory, threads) for model in models]
        for future in as_completed(futures, loop=self.client.loop):
            model = self.futures[future]
            assert isinstance(model, MatrixModel)
            answer = self._answer(future)
            if answer.status == 0:
                self.digests[model] = answer.result["digests"]
            for index, cell in enumerate(self._cells_of(model)):
                found = answer.result["cells"][index] if answer.status == 0 else {}
                if "memory" in found and found["memory"] <= self.memory:
                    self.needs[cell.name] = found
                elif "memory" in found:
                    error = ResourceError(
                        "not enough memory",
                        expected=f"a worker with {found['memory']:,} bytes",
                        found=f"{self.memory:,} at most",
                    )
                    self._ended(cell, "failed", error.exit_status, str(error), None, answer)
                elif "manifest" in found:
                    self._ended(cell, "reused", 0, "", found["manifest"], answer)
                else:
                    status, message = found.get("status", answer.status), found.get("message", answer.message)
                    self._ended(cell, "failed", status, message, None, answer)

    def _cells_of(self, model: MatrixModel) -> list[Cell]:
        return [cell for cell in self.matrix.cells if cell.model == model]

    def _build(self, cells: list[Cell]) -> None:
        """Build cells, as many at once as workers have memory for."""
        from distributed import as_completed

        if not cells:
            return
        threads = self.options.threads or self._threads(cells)
        begun: list[Future[Answer]] = []
        for cell in cells:
            group = self.needs[cell.name]["calibration"]
            if group in self.waiting:
                self.waiting[group].append(cell)
                continue
            if group is not None:
                self.waiting[group] = []
            begun.append(self._begin(cell, threads, self.options.fresh))
        completed = as_completed(begun, loop=self.client.loop)
        for future in completed:
            built, answer = self.futures[future], self._answer(future)
            assert isinstance(built, Cell)
            group = self.needs[built.name]["calibration"]
            followers = self.waiting.pop(group, [])
            if answer.status and len(followers) > 1:  # it may have left no calibration: another has to try
                self.waiting[group] = followers[1:]
                followers = followers[:1]
            # With --fresh, the first has made the calibration anew.
            completed.update(
                [self._begin(each, threads, self.options.fresh and answer.status != 0) for each in followers]
            )
            result, manifest = "failed" if answer.status else "built", answer.result.get("manifest")
            message = answer.message or self.needs[built.name]["why"]
            self._ended(built, result, answer.status, message, manifest, answer)

    def _threads(self, cells: list[Cell]) -> int | None:
        """Of each build: its share of this machine, if as many run as can. None: workers share out their own."""
        if self.options.scheduler is not None:
            return None
        from dask.system import CPU_COUNT  # which knows the limits of containers

        processors = int(CPU_COUNT)
        fit: int = self.memory // max(self.needs[cell.name]["memory"] for cell in cells)
        return max(1, processors // min(len(cells), processors, fit))

    def _begin(self, cell: Cell, threads: int | None, fresh: bool) -> Future[Answer]:
        return self._submit(cell.model, "build", [cell], self.needs[cell.name]["memory"], threads, fresh)

    def _submit(
        self,
        model: MatrixModel,
        task: str,
        cells: list[Cell],
        memory: int,
        threads: int | None,
        fresh: bool | None = None,
    ) -> Future[Answer]:
        from tundish.matrix_worker import Asked, work

        said = {"model": model.title} | ({"recipe": cells[0].recipe.name} if task == "build" else {})
        asked = Asked(
            run=self.run_name,
            task=task,
            model=_source(model),
            revision=model.revision,
            recipes=tuple((cell.recipe.name, resolved_yaml(cell.recipe)) for cell in cells),
            outs=tuple(str(self._out(cell)) for cell in cells),
            threads=threads,
            fresh=self.options.fresh if fresh is None else fresh,
            known=self.digests.get(model),
            folder=str(Path.cwd()),
            said=said,
        )
        key = f"{task}-{'/'.join(said.values())}-{self.run_name}"
        resources = {MEMORY: memory}
        future = self.client.submit(work, asked, key=key, resources=resources, retries=_RETRIES, pure=False)
        self.futures[future] = cells[0] if task == "build" else model
        return future

    def _out(self, cell: Cell) -> Path:
        return self.options.out / cell.model.title / cell.recipe.name

    def _answer(self, future: Future[Answer]) -> Answer:
        """What a task came to; status 1 if Dask gave it up."""
        from tundish.matrix_worker import Answer

        if future.status == "finished":
            answer: Answer = future.result()
            return answer
        error = future.exception() if future.status == "error" else None
        return Answer(1, str(error) if error else "the scheduler gave it up", {}, "", 0.0)

    def _ended(self, cell: Cell, result: str, status: int, message: str, manifest: Json | None, answer: Answer) -> None:
        seconds = answer.seconds if result != "reused" else 0.0
        try:
            self._sign(cell, result, manifest)
        except TundishError as error:  # somebody else was at it
            result, status, message = "failed", error.exit_status, str(error)
        outcome = Outcome(cell, self._out(cell), result, status, message, manifest, answer.worker, seconds)
        self.outcomes[cell.name] = outcome
        self.observed.runs.append(outcome.as_run())
        self.observed.events.emit("cell", **outcome.as_dict())
        self.say(f"[{cell.name}] {result}" + (f": {message}" if message else ""))

    def _sign(self, cell: Cell, result: str, manifest: Json | None) -> None:
        """Sign a build of this run, or an earlier one that nobody has signed."""
        signer, out = self.options.signer, self._out(cell)
        if signer is None or result == "failed":
            return

        def say(text: str) -> None:
            self.say(f"[{cell.name}] {text}")

        if result == "reused" and (out / SIGNATURE).exists():
            say("signed already, by whomever: verify --key tells")
        else:
            sign_folder(out, signer, self.options.threads or cores(), say, manifest)
            say("signed")
