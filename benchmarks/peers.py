"""The tools that people convert with today, each with its documented command line.

They live where they were installed: in virtual environments (`--peers DIR`, may be repeated: their requirements differ,
transformers 4 for one, 5 for another) and, llama.cpp, in its source folder with convert_hf_to_gguf.py (`--llama-cpp
DIR`), the built llama-quantize in its build/bin or on PATH. What is not found is reported as such.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from benchmarks.measure import Cost, run, settle

Command: TypeAlias = list[str | Path]

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CONVERTER = "convert_hf_to_gguf.py"


class MissingError(Exception):
    """A peer, or a part of it, is not installed; the message says which."""


@dataclass(frozen=True, slots=True)
class Installed:
    """Where to look: Pythons of virtual environments, and llama.cpp's source folder."""

    pythons: tuple[Path, ...]
    llama_cpp: Path | None

    def python(self, *modules: str) -> Path:
        """The first Python that can import the modules. MissingError names those that the best one lacks."""
        missing = list(modules)
        for python in self.pythons:
            if _imports(python, *modules):
                return python
            lacking = [module for module in modules if not _imports(python, module)]
            missing = min(missing, lacking, key=len)
        raise MissingError(f"no {', '.join(missing or modules)}")

    def converter(self) -> Path:
        """llama.cpp's script."""
        if self.llama_cpp is None or not (self.llama_cpp / CONVERTER).is_file():
            raise MissingError(f"no {CONVERTER}")
        return self.llama_cpp / CONVERTER

    def quantize(self) -> Path:
        """llama.cpp's program."""
        near = [self.llama_cpp / "build" / "bin", self.llama_cpp / "bin"] if self.llama_cpp else []
        found = shutil.which("llama-quantize", path=os.pathsep.join([*map(str, near), os.environ.get("PATH", "")]))
        if found is None:
            raise MissingError("no llama-quantize")
        return Path(found)


def _imports(python: Path, *modules: str) -> bool:
    command: Command = [python, "-c", f"import {', '.join(modules)}"]
    found = subprocess.run(command, capture_output=True, check=False, cwd=python.parent)  # noqa: S603 - the user named it
    return found.returncode == 0


@dataclass(frozen=True, slots=True)
class Peer:
    """A tool: `commands(installed, checkpoint, out)` are run in order and leave `artifact` inside the folder `out`."""

    name: str
    commands: Callable[[Installed, Path, Path], list[Command]]
    artifact: str

    def convert(self, installed: Installed, checkpoint: Path, out: Path) -> Cost:
        """Run it into a new folder. MissingError if it is not installed, CommandError if it fails."""
        commands = self.commands(installed, checkpoint, out)
        out.mkdir(parents=True)
        settle(checkpoint)
        costs = [run(command, cwd=out, extra=ENVIRONMENT) for command in commands]
        return sum(costs[1:], costs[0])


def _llama_cpp(kind: str) -> Callable[[Installed, Path, Path], list[Command]]:
    def commands(installed: Installed, checkpoint: Path, out: Path) -> list[Command]:
        python, whole = installed.python("gguf", "torch", "transformers"), out / "bf16.gguf"
        convert: Command = [python, installed.converter(), checkpoint, "--outtype", "bf16", "--outfile", whole]
        threads = str(os.cpu_count() or 1)
        return [convert, [installed.quantize(), whole, out / "model.gguf", kind, threads]]

    return commands


def _onnx(installed: Installed, checkpoint: Path, out: Path) -> list[Command]:
    module = "onnxruntime_genai.models.builder"
    options: Command = ["-p", "int4", "-e", "cpu", "-c", out / "cache"]
    return [[installed.python(module), "-m", module, "-i", checkpoint, "-o", out / "model", *options]]


def _openvino(installed: Installed, checkpoint: Path, out: Path) -> list[Command]:
    program = installed.python("optimum.intel", "openvino", "nncf").parent / "optimum-cli"
    options = ["--task", "text-generation-with-past", "--weight-format", "int4", "--sym", "--group-size", "32"]
    return [[program, "export", "openvino", "--model", checkpoint, *options, out / "model"]]


def _mlx(group: int) -> Callable[[Installed, Path, Path], list[Command]]:
    def commands(installed: Installed, checkpoint: Path, out: Path) -> list[Command]:
        options = ["-q", "--q-bits", "4", "--q-group-size", str(group)]
        python = installed.python("mlx_lm")
        return [[python, "-m", "mlx_lm", "convert", "--hf-path", checkpoint, "--mlx-path", out / "model", *options]]

    return commands


Q4_0 = Peer("llama.cpp Q4_0", _llama_cpp("Q4_0"), "model.gguf")
Q4_K_M = Peer("llama.cpp Q4_K_M", _llama_cpp("Q4_K_M"), "model.gguf")
ONNX = Peer("onnxruntime-genai builder", _onnx, "model")
OPENVINO = Peer("optimum-cli openvino", _openvino, "model")
MLX = Peer("mlx_lm convert, group 64", _mlx(64), "model")


def add_options(parser: argparse.ArgumentParser) -> None:
    """--peers and --llama-cpp."""
    parser.add_argument("--peers", type=Path, action="append", help="a virtual environment with peers; may be repeated")
    parser.add_argument("--llama-cpp", type=Path, help=f"llama.cpp's source folder, which has {CONVERTER}")


def installed(environments: Sequence[Path] | None, llama_cpp: Path | None) -> Installed:
    """The environments' Pythons, or this one."""
    pythons = [folder.absolute() / "bin" / "python" for folder in environments or ()]
    return Installed(tuple(pythons or [Path(sys.executable)]), llama_cpp and llama_cpp.absolute())
