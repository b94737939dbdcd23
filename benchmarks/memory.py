"""Peak memory against the number of layers: a conversion that streams needs as much for 32 as for 8.

python -m benchmarks.memory --work build/bench --layers 8 16 32
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks import table
from benchmarks.checkpoint import SHAPES
from benchmarks.convert import WORKS, build_command, made_checkpoint
from benchmarks.measure import Cost, run, settle


def measure(work: Path, shape: str, layers: int) -> Cost:
    """All four containers from a checkpoint that is made for it and removed again."""
    folder = work / f"{shape}-{layers}"
    kept = folder.exists()
    checkpoint = made_checkpoint(work, shape, layers).absolute()
    out = work.absolute() / "memory"
    shutil.rmtree(out, ignore_errors=True)
    settle(checkpoint)
    try:
        return run(build_command(WORKS["all"], checkpoint, out))
    finally:
        shutil.rmtree(out, ignore_errors=True)
        if not kept:
            shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description="Peak memory by layers.")
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--shape", choices=SHAPES, default="phi-3.5-mini")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    costs: dict[int, Cost] = {}
    for layers in options.layers:
        print(f"{layers} layers", file=sys.stderr)
        costs[layers] = measure(options.work, options.shape, layers)
    first = costs[options.layers[0]]
    rows = [
        [
            str(layers),
            table.seconds(cost.seconds),
            table.gigabytes(cost.memory),
            table.times(cost.memory / first.memory),
        ]
        for layers, cost in costs.items()
    ]
    print(table.show(f"All four containers, {options.shape}", ["layers", "s", "RAM GB", "of the first"], rows))
    table.write_json(options.json, {str(layers): cost.memory for layers, cost in costs.items()})


if __name__ == "__main__":
    main()
