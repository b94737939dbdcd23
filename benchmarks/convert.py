"""What conversions cost: time and memory, against copying the same bytes and against the peers, in one run.

    python -m benchmarks.convert --work build/bench
    python -m benchmarks.convert --work build/bench --with-peers --peers ENV --llama-cpp DIR --json figures.json

Runs of tundish and of its peers take turns; a time is the median of the rounds, memory the largest of them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from benchmarks import peers, table
from benchmarks.checkpoint import SHAPES
from benchmarks.measure import CommandError, Cost, copy_cost, middle, run, settle
from benchmarks.peers import Installed, MissingError, Peer

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True)
class Work:
    """A row of the table: a recipe, the targets built of it (none: all), and the peers that do the same."""

    name: str
    recipe: str
    targets: tuple[str, ...]
    peers: tuple[Peer, ...]


WORKS = {
    "all": Work("all four, int4 g32", "int4", (), (peers.Q4_0, peers.ONNX, peers.OPENVINO, peers.MLX)),
    "gguf": Work("GGUF, int4 g32 (Q4_0)", "int4", ("gguf",), (peers.Q4_0,)),
    "q4_0": Work("GGUF, the mix Q4_0", "q4_0", (), (peers.Q4_0,)),
    "q4_k_m": Work("GGUF, Q4_K_M", "q4_k_m", (), (peers.Q4_K_M,)),
    "onnx": Work("ONNX", "int4", ("onnx",), (peers.ONNX,)),
    "openvino": Work("OpenVINO", "int4", ("openvino",), (peers.OPENVINO,)),
    "mlx": Work("MLX", "int4", ("mlx",), (peers.MLX,)),
    "calibrated": Work("all four, with calibration", "int4-calibrated", (), ()),
}


@dataclass(slots=True)
class Figures:
    """What the rounds of one row cost. `why` says why a peer has none, by its name."""

    ours: list[Cost] = field(default_factory=list)
    copies: list[Cost] = field(default_factory=list)
    artifacts: int = 0
    peers: dict[str, list[Cost]] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)


def build_command(work: Work, checkpoint: Path, out: Path) -> list[str | Path]:
    """The command line of a row: nothing is verified."""
    options = [word for target in work.targets for word in ("--target", target)]
    recipe = RECIPES / f"{work.recipe}.yaml"
    start: list[str | Path] = [sys.executable, "-m", "tundish", "build", recipe, "--model", checkpoint]
    return [*start, "--out", out, "--no-verify", *options]


def measure_ours(work: Work, checkpoint: Path, scratch: Path, figures: Figures) -> None:
    """One round of tundish, and of copying what it read and wrote."""
    out = scratch / "ours"
    settle(checkpoint)
    figures.ours.append(run(build_command(work, checkpoint, out)))
    figures.artifacts = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    figures.copies.append(copy_cost(checkpoint, out, scratch / "copy"))
    shutil.rmtree(out)


def measure_peer(peer: Peer, installed: Installed, checkpoint: Path, scratch: Path, figures: Figures) -> None:
    """One round of a peer, unless it could not run before."""
    if peer.name in figures.why:
        return
    try:
        cost = peer.convert(installed, checkpoint, scratch / "peer")
        figures.peers.setdefault(peer.name, []).append(cost)
    except MissingError as error:
        figures.why[peer.name] = f"not installed ({error})"
    except CommandError as error:
        figures.why[peer.name] = str(error)
    finally:
        shutil.rmtree(scratch / "peer", ignore_errors=True)


def measure(
    works: Sequence[Work], checkpoint: Path, scratch: Path, rounds: int, installed: Installed | None
) -> dict[str, Figures]:
    """All rows, round by round. A peer that several rows name runs once a round and counts for each."""
    found = {work.name: Figures() for work in works}
    for number in range(rounds):
        shared = Figures()
        for work in works:
            print(f"round {number + 1} of {rounds}: {work.name}", file=sys.stderr)
            figures = found[work.name]
            measure_ours(work, checkpoint, scratch, figures)
            for peer in work.peers if installed else ():
                assert installed is not None
                if peer.name not in shared.peers:
                    shared.why |= figures.why
                    measure_peer(peer, installed, checkpoint, scratch, shared)
                if peer.name in shared.peers:
                    figures.peers.setdefault(peer.name, []).append(shared.peers[peer.name][0])
                elif peer.name in shared.why:
                    figures.why[peer.name] = shared.why[peer.name]
    return found


def table_row(work: Work, figures: Figures) -> list[str]:
    """name, s, GB of memory, GB of artifacts, times copying, the peers' s and memory, their time over ours."""
    ours = middle(figures.ours)
    copying = median(mine.seconds / copy.seconds for mine, copy in zip(figures.ours, figures.copies, strict=True))
    row = [work.name, table.seconds(ours.seconds), table.gigabytes(ours.memory), table.gigabytes(figures.artifacts)]
    row.append(table.times(copying))
    theirs = [figures.peers.get(peer.name, []) for peer in work.peers]
    if not theirs or not all(theirs):
        return [*row, *[table.NONE] * 3]
    rounds = [sum(costs[1:], costs[0]) for costs in zip(*theirs, strict=True)]
    ratio = median(other.seconds / mine.seconds for other, mine in zip(rounds, figures.ours, strict=True))
    cost = middle(rounds)
    return [*row, table.seconds(cost.seconds), table.gigabytes(cost.memory), table.times(ratio)]


HEADER = ["conversion", "s", "RAM GB", "files GB", "of copying", "peers s", "RAM GB", "peers/ours"]


def report(works: Sequence[Work], found: dict[str, Figures]) -> str:
    """The table, a line for each peer, and one for each that did not run."""
    lines = [table.show(table.machine(), HEADER, [table_row(work, found[work.name]) for work in works])]
    seen: dict[str, str] = {}
    for figures in found.values():
        for name, costs in figures.peers.items():
            cost = middle(costs)
            seen[name] = f"{table.seconds(cost.seconds)} s, {table.gigabytes(cost.memory)} GB"
        seen |= figures.why
    return "\n".join([*lines, *(f"{name}: {text}" for name, text in seen.items())])


def start_up(rounds: int = 7) -> Cost:
    """`tundish recipes`, which reads every recipe and no model."""
    return middle([run([sys.executable, "-m", "tundish", "recipes"]) for _ in range(rounds)])


def warm_up(works: Sequence[Work], scratch: Path) -> None:
    """Have numba compile and keep the kernels, on a model of one layer."""
    run([sys.executable, "-m", "benchmarks.checkpoint", "small", scratch / "small"])
    for work in works:
        run(build_command(work, scratch / "small", scratch / "warm"))
        shutil.rmtree(scratch / "warm")
    shutil.rmtree(scratch / "small")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description="Time conversions.")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="a folder with room for all files")
    parser.add_argument("--model", type=Path, help="a checkpoint; default: one of --shape is made in the work folder")
    parser.add_argument("--shape", choices=SHAPES, default="phi-3.5-mini")
    parser.add_argument("--layers", type=int, help="another number of blocks than the shape's own")
    parser.add_argument("--rows", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--with-peers", action="store_true", help="measure the peers too")
    parser.add_argument("--json", type=Path)
    peers.add_options(parser)
    options = parser.parse_args()
    works = [WORKS[name] for name in options.rows]
    checkpoint = options.model or made_checkpoint(options.work, options.shape, options.layers)
    scratch = options.work.absolute() / "convert"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    warm_up(works, scratch)
    installed = peers.installed(options.peers, options.llama_cpp) if options.with_peers else None
    found = measure(works, checkpoint.absolute(), scratch, options.rounds, installed)
    started = start_up()
    shutil.rmtree(scratch)
    print(report(works, found))
    print(f"tundish recipes: {started.seconds:.2f} s, {table.gigabytes(started.memory)} GB")
    table.write_json(
        options.json, {"rows": {name: asdict(each) for name, each in found.items()}, "start": started.seconds}
    )


def made_checkpoint(work: Path, shape: str, layers: int | None) -> Path:
    """The checkpoint of that shape in the work folder; made once and kept."""
    folder = work / (shape if layers is None else f"{shape}-{layers}")
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        cut = [] if layers is None else ["--layers", str(layers)]
        run([sys.executable, "-m", "benchmarks.checkpoint", shape, folder, *cut])
    return folder


if __name__ == "__main__":
    main()
