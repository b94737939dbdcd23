"""What runs on a worker of Dask for `tundish matrix`: a child process a task, so that a crash is one cell's.

A task that the scheduler wants no more, because its client left or cancelled it, ends its child in seconds; and a child
whose worker was killed ends by itself, since its standard input closes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tundish.cell import Request
from tundish.child import without_signing_key

if TYPE_CHECKING:
    from distributed import Worker

_POLL = 0.2  # seconds between two looks whether the task is still wanted
_GRACE = 5.0  # seconds for a child to unwind before it is killed
_WANTED = ("executing", "long-running")
_CLOSING = ("closing", "closed", "failed", "stopping", "stopped")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A task: a survey of several recipes, or the build of one. `recipes`: name and YAML of each; `threads` None: this
    worker's share of the processors; `folder`: to work in, if it is there; `said`: parts of every event."""

    run: str  # names the matrix's run, and the topic of its events
    task: str
    model: str
    revision: str | None
    recipes: tuple[tuple[str, str], ...]
    outs: tuple[str, ...]
    threads: int | None
    fresh: bool
    known: Json | None
    folder: str
    said: dict[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """How a task ended. `result`: what the child said last; `status`: its exit status; `message`: its last words."""

    status: int
    message: str
    result: Json
    worker: str
    seconds: float


class ChildError(Exception):
    """A child that was killed, by the system for want of memory or by a fault of its own: worth another try."""


@dataclass(slots=True)
class _Digests:
    """Of a run's sources, which this worker has seen: read once, while others wait."""

    run: str = ""
    known: dict[tuple[str, str | None], Json] = field(default_factory=dict)
    locks: dict[tuple[str, str | None], threading.Lock] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def lock_of(self, asked: Asked) -> threading.Lock:
        with self.lock:
            if self.run != asked.run:
                self.run, self.known, self.locks = asked.run, {}, {}
            return self.locks.setdefault((asked.model, asked.revision), threading.Lock())


_DIGESTS = _Digests()


def facts(paths: list[str]) -> Json:
    """What a client has to know of this worker, and which of the paths it does not see."""
    from importlib.metadata import version

    return {"tundish": version("tundish"), "unseen": [path for path in paths if not Path(path).exists()]}


def work(asked: Asked) -> Answer:
    """Do a task in a child process. ChildError if that was killed."""
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()
    begun = time.monotonic()

    def wanted() -> bool:
        task = worker.state.tasks.get(key)
        return task is not None and task.state in _WANTED and worker.status.name not in _CLOSING

    with _DIGESTS.lock_of(asked):
        at = (asked.model, asked.revision)
        known = _DIGESTS.known.get(at)
        answer = None
        if known is None or asked.task == "survey":
            surveyed = asked if asked.task == "survey" else replace(asked, task="survey", recipes=(), outs=())
            answer = _run(surveyed, known or asked.known, worker, wanted, begun)
            if answer.status == 0:
                known = _DIGESTS.known[at] = answer.result["digests"]
    if answer is not None and (asked.task == "survey" or answer.status != 0):
        return answer
    return _run(asked, known, worker, wanted, begun)


def _run(asked: Asked, known: Json | None, worker: Worker, wanted: Callable[[], bool], begun: float) -> Answer:
    from dask.system import CPU_COUNT

    threads = asked.threads or max(1, CPU_COUNT // worker.state.nthreads)
    topic, said = asked.run, {**asked.said, "worker": worker.address}
    last: Json = {}

    def relay(stream: IO[bytes]) -> None:
        for line in stream:
            if not line.endswith(b"\n"):
                return  # the child was killed while it wrote
            event = json.loads(line)
            if event["event"] in ("result", "failed"):
                last.update(event)
            else:
                worker.log_event(topic, {**event, **said})

    with tempfile.TemporaryDirectory(prefix="tundish-") as scratch:
        request, log = _write_request(Path(scratch), asked, known, threads), Path(scratch, "log")
        with log.open("wb") as errors:
            process = subprocess.Popen(  # noqa: S603  # our own interpreter and module, no shell
                [sys.executable, "-P", "-m", "tundish.cell", str(request)],
                stdin=subprocess.PIPE,  # stays open while this process lives: see exit_with_parent
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=asked.folder if Path(asked.folder).is_dir() else None,
                env=without_signing_key(),  # whoever asked for the matrix signs
                start_new_session=True,
            )
        assert process.stdin is not None and process.stdout is not None
        with process.stdin, process.stdout:
            reader = threading.Thread(target=relay, args=(process.stdout,), daemon=True)
            reader.start()
            try:
                _wait(process, wanted)
            finally:
                _end(process)
                reader.join()
        words = log.read_text(encoding="utf-8", errors="replace").split("\n")
    seconds = round(time.monotonic() - begun, 3)
    return _answer(process.returncode, last, words, worker.address, seconds)


def _answer(code: int, last: Json, words: list[str], worker: str, seconds: float) -> Answer:
    if code < 0:
        raise ChildError(f"a process of {worker} was killed by {signal.Signals(-code).name}")
    if code == 0:
        return Answer(0, "", last, worker, seconds)
    said = next((line for line in reversed(words) if line.strip()), f"ended with status {code}")
    return Answer(code, last.get("message", said), last, worker, seconds)


def _write_request(scratch: Path, asked: Asked, known: Json | None, threads: int) -> Path:
    recipes = []
    for name, text in asked.recipes:
        recipes.append(str(scratch / f"{name}.yaml"))
        Path(recipes[-1]).write_text(text, encoding="utf-8")
    outs = list(asked.outs)
    request = Request(asked.task, asked.model, asked.revision, recipes, outs, threads, asked.fresh, known)
    path = scratch / "request.json"
    path.write_text(json.dumps(asdict(request)), encoding="utf-8")
    return path


def _wait(process: subprocess.Popen[bytes], wanted: Callable[[], bool]) -> None:
    """Until the process has ended, or is not wanted any more."""
    while wanted():
        try:
            process.wait(_POLL)
            return
        except subprocess.TimeoutExpired:
            pass


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs: gently, so that it removes what it did not finish, then not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
