"""What a command does, as JSON lines for programs: an object a line, each with `event` and `time`. See docs/jobs.md."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import IO, Any

from converters.errors import ResourceError, UsageError
from converters.mask import masked
from tundish.escapes import json_line
from tundish.watcher import Watcher

_INTERVAL = 1.0  # seconds between two `progress` lines of a phase
STANDARD_ERROR = "-"
_MAX_LINE = 1 << 20  # bytes read of a file to see whose it is

Event = Mapping[str, Any]  # Any: JSON, written and never read


@dataclass(slots=True)
class Events:
    """Hands events to `take`, from any thread, one at a time."""

    take: Callable[[Event], None]
    alone: bool = False  # whether they take the place of what people are told
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _phase: str = ""
    _done: int = 0
    _total: int = 0
    _told: float = 0.0

    def emit(self, event: str, **parts: object) -> None:
        """Tell an event with these parts."""
        with self._lock:
            self._tell(event, parts)

    def pass_on(self, event: Event, **parts: object) -> None:
        """Tell an event of another process, with these parts added."""
        with self._lock:
            self.take({**event, **parts})

    def start(self, text: str, total: int) -> None:
        """A phase begins."""
        with self._lock:
            self._phase, self._done, self._total, self._told = text, 0, total, monotonic()
            self._tell("phase", {"phase": text, "done": 0, "total": total})

    def advance(self, amount: int) -> None:
        """The phase goes on; told once a second and at its end."""
        with self._lock:
            self._done += amount
            now = monotonic()
            if now - self._told >= _INTERVAL or self._done == self._total:
                self._told = now
                self._tell("progress", {"phase": self._phase, "done": self._done, "total": self._total})

    def _tell(self, event: str, parts: Event) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.take({"event": event, "time": now, **parts})

    def gates(self, manifest: Mapping[str, Any]) -> None:
        """Every gate of a manifest."""
        for target, result in (manifest["verification"] or {}).items():
            for gate in result["gates"]:
                self.emit("gate", target=target, **{"gate" if name == "name" else name: gate[name] for name in _GATE})


_GATE = ("name", "passed", "figure", "threshold", "detail")


def watching(events: Events, also: Watcher) -> Watcher:
    """A watcher that tells both."""

    def say(text: str) -> None:
        also.say(text)
        events.emit("message", message=text)

    def start(text: str, total: int) -> None:
        also.start(text, total)
        events.start(text, total)

    def advance(amount: int) -> None:
        also.advance(amount)
        events.advance(amount)

    def published(out: Path) -> None:
        also.published(out)
        events.emit("published", out=str(out))

    return Watcher(say, start, advance, published)


@contextmanager
def written(file: str | None) -> Iterator[Events]:
    """Events that go to a file, a line each, or to standard error if it is `-`; nowhere if there is none.

    UsageError for a file that is neither empty nor of earlier events. One that cannot be written to any more ends the
    lines, not the command: ResourceError says so when that is done.
    """
    if file is None:
        yield Events(lambda event: None)
    elif file == STANDARD_ERROR:
        yield Events(_writer(sys.stderr.buffer, "standard error", []), alone=True)
    else:
        try:
            _require_own(Path(file))
            stream = Path(file).open("wb", buffering=0)  # noqa: SIM115  # only opening it may fail here
        except OSError as error:
            what = f"cannot write events: {error.strerror}"
            raise UsageError(what, where=file, mend="Choose another --events.") from error
        failures: list[OSError] = []
        with stream:
            yield Events(_writer(stream, file, failures))
        if failures:
            raise ResourceError(
                "not all events could be written",
                where=file,
                found=failures[0].strerror,
                mend="What the command did is done. Choose another --events.",
            )


def _require_own(path: Path) -> None:
    """UsageError if the file holds anything but events. OSError if it cannot be read."""
    if not path.exists() or path.is_char_device():
        return
    mend = "Choose another --events."
    if not path.is_file():  # a pipe would be waited for
        raise UsageError("cannot write events: not a file", where=str(path), mend=mend)
    with path.open("rb") as stream:
        first = stream.readline(_MAX_LINE)
    if first and not _is_event(first):
        expected = "nothing, or events of an earlier command"
        raise UsageError("--events holds another file", where=str(path), expected=expected, mend=mend)


def _is_event(line: bytes) -> bool:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(event, dict) and {"event", "time"} <= event.keys()


def _writer(stream: IO[bytes], name: str, failures: list[OSError]) -> Callable[[Event], None]:
    """The first failure ends the lines, and is kept."""

    def take(event: Event) -> None:
        if failures:
            return
        try:
            line = masked(json_line(event)) + "\n"
            stream.write(line.encode("utf-8", "backslashreplace"))
            stream.flush()
        except OSError as error:
            failures.append(error)
            print(f"warning: no more events: {name}: {error.strerror}", file=sys.stderr)

    return take
