"""A decode step of our artifact against the peer's own: same checkpoint, same runtime, same bits.

    python -m benchmarks.decode --work build/bench --models sample phi-3.5-mini --peers ENV --llama-cpp DIR

Both artifacts are open at the same time, each in its own process, and decode in turn. A step's time is the median of a
round's steps. Where weights come to lie in memory alone makes identical files differ by up to a tenth, and the one that
was opened first is the slower one, so both are opened anew for each session, in turn. The ratio is the median over all
rounds of the peer's step over ours: above 1 ours is faster. How sure it is shows in the quartiles of those ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from benchmarks import peers, table
from benchmarks.convert import RECIPES, made_checkpoint
from benchmarks.measure import CommandError, run
from benchmarks.peers import Installed, MissingError, Peer

Ask = Callable[[], list[float]]
"""One more round: the seconds of each step."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A recipe's artifact and the peer's artifact that it is compared with, in a runtime of benchmarks.runtimes."""

    name: str
    recipe: str
    runtime: str
    artifact: str
    peer: Peer


PAIRS = {
    "q4_0": Pair("llama.cpp, Q4_0", "q4_0", "gguf", "gguf/model.gguf", peers.Q4_0),
    "q4_k_m": Pair("llama.cpp, Q4_K_M", "q4_k_m", "gguf", "gguf/model.gguf", peers.Q4_K_M),
    "onnx": Pair("ONNX Runtime GenAI, all int4 g32", "onnx-all-int4", "onnx", "onnx", peers.ONNX),
    "onnx-head8": Pair("the same, embedding and head int8", "int4", "onnx", "onnx", peers.ONNX),
    "openvino": Pair("OpenVINO GenAI, int4 g32, head int8", "int4", "openvino", "openvino", peers.OPENVINO),
    "mlx": Pair("MLX, all int4 g64, fp16", "mlx-all-int4", "mlx", "mlx", peers.MLX),
    "mlx-fp32": Pair("MLX, all int4 g64, fp32", "mlx-all-int4-fp32", "mlx", "mlx", peers.MLX),
}


@dataclass(frozen=True, slots=True)
class Compared:
    """Seconds of a step, ours and the peer's, round by round."""

    ours: list[float]
    peer: list[float]

    @property
    def ratio(self) -> float:
        """Above 1: ours is faster."""
        return median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between them lie half of the rounds' ratios."""
        low, _, high = quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    @property
    def ratios(self) -> list[float]:
        """Round by round."""
        return [theirs / mine for mine, theirs in zip(self.ours, self.peer, strict=True)]


@contextmanager
def worker(runtime: str, artifact: Path, tokens: int, threads: int) -> Iterator[Ask]:
    """A process that holds the artifact open. CommandError if it ends before it is asked to."""
    options = [str(artifact), "--tokens", str(tokens), "--threads", str(threads)]
    command = [sys.executable, "-m", "benchmarks.runtimes", runtime, *options]
    process = subprocess.Popen(  # noqa: S603 - our own module
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def answer() -> str:
        line = stdout.readline()
        if not line:
            raise CommandError(f"the {runtime} worker of {artifact} ended with status {process.wait()}")
        return line

    def ask() -> list[float]:
        stdin.write("again\n")
        stdin.flush()
        steps: list[float] = json.loads(answer())
        return steps

    try:
        while answer() != "ready\n":  # runtimes print what they like while they load
            pass
        yield ask
    finally:
        stdin.close()
        process.wait()


def compare(ours: Ask, peer: Ask, rounds: int, found: Compared) -> None:
    """Add rounds, in turn; who goes first changes, as heat and neighbours drift."""
    turns = [(ours, found.ours), (peer, found.peer)]
    for number in range(rounds):
        for ask, times in turns if number % 2 == 0 else turns[::-1]:
            times.append(median(ask()))


def measure(pair: Pair, checkpoint: Path, cache: Path, options: argparse.Namespace, installed: Installed) -> Compared:
    """Build what is not yet in `cache`, then compare. MissingError or CommandError says why there is no figure."""
    theirs = cache / pair.peer.name.replace(" ", "-")
    if not (theirs / pair.peer.artifact).exists():
        shutil.rmtree(theirs, ignore_errors=True)
        pair.peer.convert(installed, checkpoint, theirs)
        (theirs / "bf16.gguf").unlink(missing_ok=True)
    ours = cache / f"ours-{pair.recipe}-{pair.runtime}"
    if not ours.exists():
        recipe = RECIPES / f"{pair.recipe}.yaml"
        only = ["--no-verify", "--target", pair.runtime]
        run([sys.executable, "-m", "tundish", "build", recipe, "--model", checkpoint, "--out", ours, *only])
    slow = pair.runtime == "mlx" and sys.platform != "darwin"  # no GPU: a step takes seconds
    tokens, sessions, rounds = (2, 2, 2) if slow else (options.tokens, options.sessions, options.rounds)
    found = Compared([], [])
    for session in range(sessions):
        artifacts = [ours / pair.artifact, theirs / pair.peer.artifact]
        turn = 1 if session % 2 == 0 else -1
        with ExitStack() as stack:
            opened = [
                stack.enter_context(worker(pair.runtime, path, tokens, options.threads)) for path in artifacts[::turn]
            ]
            mine, other = opened[::turn]
            compare(mine, other, rounds, found)
    return found


def table_row(pair: Pair, found: Compared | str) -> list[str]:
    """name, our ms a token, the peer's, the ratio and its quartiles."""
    if isinstance(found, str):
        return [pair.name, *[table.NONE] * 4]
    ours, peer = median(found.ours), median(found.peer)
    return [
        pair.name,
        table.milliseconds(ours),
        table.milliseconds(peer),
        table.times(found.ratio),
        _range(*found.quartiles),
    ]


def _range(low: float, high: float) -> str:
    return f"{low:.2f} to {high:.2f}"


HEADER = ["runtime and bits", "ours, ms", "peer, ms", "peer/ours", "half of rounds"]


def find_checkpoint(name: str, work: Path, layers: int | None) -> Path:
    """The sample, a folder, or a shape."""
    if name == "sample":
        folder = work / "sample"
        if not (folder / "config.json").is_file():
            run([sys.executable, "-m", "tundish", "sample", folder])
        return folder
    return Path(name) if (Path(name) / "config.json").is_file() else made_checkpoint(work, name, layers)


def measure_all(checkpoint: Path, pairs: Sequence[Pair], options: argparse.Namespace) -> dict[str, Compared | str]:
    """Every pair on one checkpoint, by name."""
    installed = peers.installed(options.peers, options.llama_cpp)
    cache = options.work.absolute() / f"decode-{checkpoint.name}"
    found: dict[str, Compared | str] = {}
    for pair in pairs:
        print(f"{checkpoint.name}: {pair.name}", file=sys.stderr)
        try:
            found[pair.name] = measure(pair, checkpoint.absolute(), cache, options, installed)
        except MissingError as error:
            found[pair.name] = f"{pair.peer.name} is not installed ({error})"
        except CommandError as error:
            found[pair.name] = str(error)
    if not options.keep:
        shutil.rmtree(cache, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description="Compare decode steps.")
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--models", nargs="+", default=["sample", "phi-3.5-mini"], help="sample, a shape or a folder")
    parser.add_argument("--layers", type=int, help="of shapes: another number of blocks than their own")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--tokens", type=int, default=64, help="a round")
    parser.add_argument("--sessions", type=int, default=6, help="how often both artifacts are opened")
    parser.add_argument("--rounds", type=int, default=5, help="of each, a session")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", action="store_true", help="keep the artifacts for another run")
    parser.add_argument("--json", type=Path)
    peers.add_options(parser)
    options = parser.parse_args()
    document: dict[str, dict[str, object]] = {}
    for name in options.models:
        checkpoint = find_checkpoint(name, options.work, options.layers)
        found = measure_all(checkpoint, [PAIRS[key] for key in options.pairs], options)
        rows = [table_row(PAIRS[key], found[PAIRS[key].name]) for key in options.pairs]
        print(table.show(f"A decode step, {checkpoint.name}, {table.machine()}", HEADER, rows), flush=True)
        for missing, why in found.items():
            if isinstance(why, str):
                print(f"{missing}: {why}")
        document[checkpoint.name] = {
            key: each if isinstance(each, str) else {"ours": each.ours, "peer": each.peer, "ratio": each.ratio}
            for key, each in found.items()
        }
    table.write_json(options.json, document)


if __name__ == "__main__":
    main()
