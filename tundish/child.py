"""Runs a Python module in a process of its own, with a time limit, so that a crash or a hang stays there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

_SHOWN_LINES = 6


@dataclass(frozen=True, slots=True)
class Ending:
    """How a child ended: `failure` is None if it did what it should, else one sentence with its last words."""

    failure: str | None


def without_signing_key() -> dict[str, str]:
    """This process's environment for a child that signs nothing, least of all one that runs what strangers wrote."""
    return {name: value for name, value in os.environ.items() if name != "TUNDISH_SIGNING_KEY"}


def run_child(module: str, arguments: list[str], log: Path, seconds: float, threads: int) -> Ending:
    """Run `python -m module arguments`; its output goes to `log`. Kills the whole process group at the time limit."""
    environment = without_signing_key() | {
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",  # artifacts are complete: nothing that a runtime does needs the network
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": str(log.absolute().parent),  # what runtimes leave behind goes with the folder
        "USE_TORCH": "0",  # transformers would import it where it is installed, which takes seconds and serves nothing
    }
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603  # our own interpreter and module, no shell
            [sys.executable, "-P", "-m", module, *arguments],  # -P: never import from the working directory
            stdin=subprocess.PIPE,  # stays open while this process lives: see exit_with_parent
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return Ending(f"still running after its time limit of {seconds:g} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
    if status == 0:
        return Ending(None)
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return Ending(f"{how}; its last words: " + " | ".join(lines[-_SHOWN_LINES:]) if lines else how)


def exit_with_parent() -> None:
    """For the child: end as soon as the parent has ended, however it did, which shows at the end of standard input."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock a thread must not hold when the interpreter ends
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
