"""Too little memory is told in a paragraph."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tundish.shortage import is_out_of_memory


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_an_address_space_of_300_mb() -> None:
    script = "import resource, tundish.cli as cli; resource.setrlimit(resource.RLIMIT_AS, (300 << 20,) * 2); cli.main()"
    command = [sys.executable, "-c", script, "plan", "phi35-aipc-int4", "--model", "sample"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 5, done.stderr
    assert "out of memory" in done.stderr and "Traceback" not in done.stderr


def test_what_libraries_raise_of_it() -> None:
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(ValueError("no"))
    raised = ImportError("numpy failed")
    raised.__cause__ = OSError("libopenblas.so: failed to map segment from shared object")
    assert is_out_of_memory(raised)
