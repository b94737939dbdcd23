"""Running a command and measuring it: wall time, and peak memory as `/usr/bin/time -v` reports it.

This module and those that import it stay small in memory on purpose: on Linux a child's ru_maxrss starts from the size
of the process that started it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO

# Set by some virtual machines to keep OpenBLAS from code that crashes there; figures are for the plain library.
UNSET = ("OPENBLAS_CORETYPE",)


class CommandError(Exception):
    """A measured command failed; the message has its last words."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one or several commands cost: seconds of wall time, bytes of peak memory."""

    seconds: float
    memory: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, max(self.memory, other.memory))


def middle(costs: Sequence[Cost]) -> Cost:
    """The median time and the largest memory of several runs."""
    return Cost(median(cost.seconds for cost in costs), max(cost.memory for cost in costs))


def run(command: Sequence[str | Path], cwd: Path | None = None, extra: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end, its output kept off the terminal. CommandError if it fails or is killed."""
    environment = {name: value for name, value in os.environ.items() if name not in UNSET} | dict(extra or {})
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(  # noqa: S603 - the benchmarks' own commands, no shell
            words, cwd=cwd, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)  # it is reaped: Popen must not wait for it again
        if child.returncode:
            raise CommandError(_failure(words, child.returncode, _tail(log)))
    return Cost(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def _tail(log: IO[bytes]) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - 4000))
    lines = log.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return "\n".join([line for line in lines if line.strip()][-3:])


def _failure(words: Sequence[str], status: int, last: str) -> str:
    ending = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"{' '.join(words[:4])} … {ending}: {last or 'no output'}"


def settle(checkpoint: Path) -> None:
    """Have the kernel write what earlier runs left in its cache, and keep the checkpoint there: all begin alike."""
    os.sync()
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(8 << 20):
                pass


def copy_cost(checkpoint: Path, artifacts: Path, scratch: Path) -> Cost:
    """Reading the checkpoint and writing the artifacts' bytes once: what a conversion cannot save.

    The copy in `scratch` is removed again; that is not part of the cost.
    """
    settle(checkpoint)
    cost = run([sys.executable, "-m", "benchmarks.copy", scratch, artifacts, *sorted(checkpoint.glob("*.safetensors"))])
    shutil.rmtree(scratch)
    return cost
