"""A module in a process of its own: whatever happens there, the parent gets one sentence about it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tundish.child import run_child


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs source text as a module, and gives the failure."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(source: str, *arguments: str, seconds: float = 60) -> str | None:
        (tmp_path / "a_child.py").write_text(source, encoding="utf-8")
        return run_child("a_child", list(arguments), tmp_path / "log.txt", seconds, threads=3).failure

    return run


def test_success_and_what_the_child_is_told(child, tmp_path: Path) -> None:
    source = "import os, sys; print(sys.argv[1:], os.environ['OMP_NUM_THREADS'], os.environ['HF_HUB_OFFLINE'])"
    assert child(source, "a b", "ü") is None
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").split("\n")[0] == "['a b', 'ü'] 3 1"


def test_an_exception_is_told_by_its_last_lines(child) -> None:
    failure = child("for i in range(20): print('line', i)\nraise ValueError('no such\\n\\nthing')")
    assert failure.startswith("ended with status 1; its last words: ")
    assert failure.endswith("ValueError: no such | thing")
    assert "line 3" not in failure


def test_a_silent_end_and_output_that_is_no_text(child) -> None:
    assert child("import sys; sys.exit(7)") == "ended with status 7"
    failure = child("import os, sys; os.write(1, b'\\xff\\xfe bad\\n'); sys.exit(7)")
    assert failure == "ended with status 7; its last words: \ufffd\ufffd bad"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_crash_in_native_code_is_named(child) -> None:
    failure = child("import os, signal; print('about to', flush=True); os.kill(os.getpid(), signal.SIGSEGV)")
    assert failure == f"was killed by {signal.SIGSEGV.name}; its last words: about to"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX process groups")
def test_a_hang_ends_with_everything_it_started(child, tmp_path: Path) -> None:
    source = """
import pathlib, subprocess, sys, time
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(inner.pid))
time.sleep(600)
"""
    started = time.monotonic()
    assert child(source, str(tmp_path / "pid"), seconds=3) == "still running after its time limit of 3 s"
    assert time.monotonic() - started < 30
    inner = int((tmp_path / "pid").read_text())
    assert _ended(inner)


def _ended(process: int) -> bool:
    """Whether a killed process is gone, or waits for whoever adopted it to collect it; it may take a moment to die."""
    for _ in range(100):
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Also when the parent had no chance to end it."""
    (tmp_path / "a_child.py").write_text(
        "import os, pathlib, sys, time\nfrom tundish.child import exit_with_parent\nexit_with_parent()\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    parent_source = (
        "import sys; from pathlib import Path; from tundish.child import run_child\n"
        f"run_child('a_child', [{str(tmp_path / 'pid')!r}], Path({str(tmp_path / 'log.txt')!r}), 600, 1)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    parent = subprocess.Popen([sys.executable, "-c", parent_source], env=environment)
    try:
        for _ in range(600):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
                break
            time.sleep(0.1)
        child = int((tmp_path / "pid").read_text())
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert _ended(child)


def test_the_working_directory_is_not_imported_from(child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint folder may hold a numpy.py; standing in it must not run that."""
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "colorsys.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(hostile)
    assert child("import colorsys") is None
